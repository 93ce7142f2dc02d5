/* A large round in one pass over its bids, and its auction, compiled: the same whole numbers as the arrays of
 * market/scoring.py and market/assignment.py, which say what each step means.
 *
 * Every array belongs to numpy; nothing here allocates. The bounds that keep 64 bits enough are `fits` of
 * market/scoring.py, checked before. Divisions are of non-negative numbers. Offers are ranked in threads, each by one of
 * them and into its own place, so what is found does not depend on how many there are.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <unistd.h>
#define THREADS 1
#else
#define THREADS 0
#endif

#define VERSION 2
#define FIELDS 9 /* of a packed bid: market.scoring.pack_bid */
#define HOUR_NS 3600000000000LL
#define DIGIT_BITS 11
#define DIGITS (1 << DIGIT_BITS)
#define BLOCK 64 /* columns whose largest value is kept: one of them is looked through again */
#define AT_ONCE 4 /* offers that a thread takes: some 200 us, so no thread waits long for the last one */
#define THREADS_MAX 8
#define MEDIAN_BITS 14 /* half of those of a scaled cost: market.assignment._BITS */

#if defined(__x86_64__) && defined(__gnu_linux__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

int64_t ichiba_rounds_version(void) { return VERSION; }

typedef struct { /* what a bid is held against; market.scoring._terms gives the same in order */
    int64_t unit_price_max, operations, moved_bytes, sandbox, device_memory, longest_ns, lock, stake, device, giga, rest,
        hour_micro, long_ns;
} terms;

typedef struct { /* an offer: `may` says of each bidder whether it can have it at all; `start`, its place in `ranked` */
    terms t;
    const int64_t *packed;
    const uint8_t *may;
    int64_t count, start;
} offer;

typedef struct { /* market.scoring.Bidders, in order of their heads; places: of the first with such highest bits */
    int64_t count, speeds_count, links_count, shift;
    const uint64_t *heads;
    const int64_t *places, *stake, *doubt_ppm, *slowdown, *speed, *link, *speeds, *links;
} bidders;

typedef struct { /* of each offer: the feasible, best first, then the rows of the refused; how many are feasible; what
                    its transfer costs over each link */
    int32_t *rows, *who;
    int64_t *scores, *able, *moving_micro;
} ranked;

typedef struct {
    uint64_t head;
    int64_t score;
    int32_t row, who;
} found;

typedef struct {
    const offer *offers;
    int64_t count;
    const bidders *b;
    const ranked *out;
    int64_t next; /* the first offer that nobody has taken */
} task;

typedef struct {
    task *of;
    int64_t *floors_ns, *moving_ns;
    found *scratch;
} worker;

/* The place of a head among the bidders, or -1. Keys are spread evenly unless somebody makes them so that they are not:
 * then the part that is searched is longer. */
static int64_t place_of(const bidders *b, uint64_t head) {
    uint64_t part = b->shift < 64 ? head >> b->shift : 0;
    int64_t first = b->places[part], count = b->places[part + 1] - first;
    const uint64_t *base = b->heads + first;
    if (!count) return -1;
    while (count > 1) { /* no branch that a processor could guess wrong */
        int64_t half = count / 2;
        base += (base[half - 1] < head) * half;
        count -= half;
    }
    return *base == head ? base - b->heads : -1;
}

static int64_t permille(int64_t value, int64_t by) {
    int64_t whole = value / 1000;
    return whole * by + (value - whole * 1000) * by / 1000;
}

/* amount * span / an hour, in two parts of the amount: market.scoring._hourly */
static int64_t hourly(int64_t amount, int64_t span_ns) {
    int64_t hours = span_ns / HOUR_NS, rest = span_ns - hours * HOUR_NS;
    int64_t high = amount >> 20, low = amount & ((1 << 20) - 1);
    int64_t product = high * rest, quotient = product / HOUR_NS;
    int64_t carried = ((product - quotient * HOUR_NS) << 20) + low * rest;
    return amount * hours + (quotient << 20) + carried / HOUR_NS;
}

/* Runs of like scores are short in most markets, and then this is far less than a call for each. */
static void insert_by_head(found *run, int64_t count) {
    for (int64_t i = 1; i < count; i++) {
        found one = run[i];
        int64_t at = i;
        for (; at > 0 && run[at - 1].head > one.head; at--) run[at] = run[at - 1];
        run[at] = one;
    }
}

static int by_head(const void *a, const void *b) {
    uint64_t left = ((const found *)a)->head, right = ((const found *)b)->head;
    return (left > right) - (left < right);
}

/* Stable, by score, from `all` through `other`; where the sorted ones lie in the end. */
static found *sorted(found *all, found *other, int64_t count, uint64_t most) {
    uint32_t starts[DIGITS];
    for (int shift = 0; shift < 64 && most >> shift; shift += DIGIT_BITS) {
        memset(starts, 0, sizeof starts);
        for (int64_t i = 0; i < count; i++) starts[((uint64_t)all[i].score >> shift) & (DIGITS - 1)]++;
        uint32_t sum = 0;
        for (int d = 0; d < DIGITS; d++) {
            uint32_t here = starts[d];
            starts[d] = sum;
            sum += here;
        }
        for (int64_t i = 0; i < count; i++) other[starts[((uint64_t)all[i].score >> shift) & (DIGITS - 1)]++] = all[i];
        found *swap = all;
        all = other;
        other = swap;
    }
    return all;
}

/* count * 10^9 / per_second, at most `most`. */
static int64_t nano_over(int64_t count, int64_t per_second, int64_t most) {
    unsigned __int128 found = (unsigned __int128)count * 1000000000 / (uint64_t)(per_second > 0 ? per_second : 1);
    return found > (uint64_t)most ? most : (int64_t)found;
}

/* The bids on one offer into its place in `out`. Its `able` is -1 where two tied bids have one head, -2 where a solver is
 * not among the bidders. */
static void rank_one(const offer *o, int64_t number, const worker *by) {
    const terms *t = &o->t;
    const bidders *b = by->of->b;
    const ranked *out = by->of->out;
    found *scratch = by->scratch;
    int64_t able = 0, refused = 0, count = o->count;
    int64_t *moving_micro = out->moving_micro + number * b->links_count;
    int32_t *rows = out->rows + o->start, *solvers = out->who + o->start;
    uint64_t most = 0;
    for (int64_t i = 0; i < b->speeds_count; i++) by->floors_ns[i] = nano_over(t->operations, b->speeds[i], t->long_ns);
    for (int64_t i = 0; i < b->links_count; i++) {
        int64_t ns = by->moving_ns[i] = nano_over(t->moved_bytes, b->links[i], t->long_ns);
        moving_micro[i] = ns > t->longest_ns ? 0 : hourly(t->hour_micro, ns);
    }
    for (int64_t row = 0; row < count; row++) {
        const int64_t *bid = o->packed + row * FIELDS;
        int64_t unit_price = bid[2], cap = bid[3], lock = bid[4], eta = bid[5];
        int64_t who = place_of(b, (uint64_t)bid[1]);
        if (who < 0) {
            out->able[number] = -2;
            return;
        }
        int64_t run_ns = permille(eta < t->long_ns ? eta : t->long_ns, b->slowdown[who]);
        if (run_ns < by->floors_ns[b->speed[who]]) run_ns = by->floors_ns[b->speed[who]];
        int64_t takes_ns = run_ns + by->moving_ns[b->link[who]], stake = b->stake[who];
        if (!o->may[who] | (unit_price > t->unit_price_max) | (cap < t->operations) | (bid[6] < t->sandbox) |
            (bid[8] < t->device_memory) | (takes_ns > t->longest_ns) | (lock < t->lock) | (stake < t->stake) |
            (lock > stake) | ((t->device >= 0) & (bid[7] != t->device))) {
            rows[count - ++refused] = (int32_t)row;
            continue;
        }
        int64_t price = t->giga * unit_price + t->rest * unit_price / 1000000000;
        int64_t risk = price * b->doubt_ppm[who] / 1000000;
        int64_t score = price + risk + hourly(t->hour_micro, run_ns) + moving_micro[b->link[who]];
        scratch[able++] = (found){(uint64_t)bid[0], score, (int32_t)row, (int32_t)who};
        most |= (uint64_t)score;
    }
    for (int64_t i = able, j = count - 1; i < j; i++, j--) { /* they came last first */
        int32_t swap = rows[i];
        rows[i] = rows[j];
        rows[j] = swap;
    }
    found *best = sorted(scratch, scratch + count, able, most);
    out->able[number] = able;
    for (int64_t first = 0, last; first < able; first = last) {
        for (last = first + 1; last < able && best[last].score == best[first].score; last++) {}
        if (last - first < 2) continue;
        if (last - first < 24) insert_by_head(best + first, last - first);
        else qsort(best + first, (size_t)(last - first), sizeof(found), by_head);
        for (int64_t i = first + 1; i < last; i++)
            if (best[i].head == best[i - 1].head) out->able[number] = -1;
    }
    for (int64_t i = 0; i < able; i++) {
        rows[i] = best[i].row;
        solvers[i] = best[i].who;
        out->scores[o->start + i] = best[i].score;
    }
}

static void *work(void *given) {
    const worker *by = given;
    task *of = by->of;
    for (;;) {
        int64_t first = __atomic_fetch_add(&of->next, AT_ONCE, __ATOMIC_RELAXED);
        if (first >= of->count) return NULL;
        for (int64_t i = first; i < first + AT_ONCE && i < of->count; i++) rank_one(of->offers + i, i, by);
    }
}

/* How many threads are of use here. */
int64_t ichiba_rounds_threads(void) {
#if THREADS
    int64_t cores = (int64_t)sysconf(_SC_NPROCESSORS_ONLN);
    return cores < 1 ? 1 : cores > THREADS_MAX ? THREADS_MAX : cores;
#else
    return 1;
#endif
}

/* The bids on every offer, in so many threads, this one among them. room: room_bytes for each, of which the first are
 * for two `found` of each of the bids on one offer, the rest for the speeds and links of the bidders. */
void ichiba_rounds_rank(const offer *offers, int64_t count, const bidders *b, const ranked *out, int64_t threads,
                        uint8_t *room, int64_t room_bytes, int64_t bids_max) {
    task of = {offers, count, b, out, 0};
    worker workers[THREADS_MAX];
    threads = threads < 1 ? 1 : threads > THREADS_MAX ? THREADS_MAX : threads;
    for (int64_t i = 0; i < threads; i++) {
        uint8_t *own = room + i * room_bytes;
        int64_t *numbers = (int64_t *)(own + 2 * bids_max * (int64_t)sizeof(found));
        workers[i] = (worker){&of, numbers, numbers + b->speeds_count, (found *)own};
    }
#if THREADS
    pthread_t others[THREADS_MAX];
    int64_t begun = 1; /* of one that cannot be begun the others do the work */
    while (begun < threads && !pthread_create(others + begun, NULL, work, workers + begun)) begun++;
    work(workers);
    for (int64_t i = 1; i < begun; i++) pthread_join(others[i], NULL);
#else
    work(workers);
#endif
}

/* Marks who has a feasible bid on one of these offers, which are `numbers` of those that were ranked. */
void ichiba_rounds_present(const int64_t *numbers, int64_t count, const int64_t *starts, const ranked *from,
                           uint8_t *present) {
    for (int64_t at = 0; at < count; at++) {
        const int32_t *who = from->who + starts[numbers[at]];
        for (int64_t i = 0; i < from->able[numbers[at]]; i++) present[who[i]] = 1;
    }
}

/* The scores of these offers by column, `never` where there is none; of each its largest. column_of: of each bidder its
 * column, or -1; costs: (count, columns). */
void ichiba_rounds_costs(const int64_t *numbers, int64_t count, const int64_t *starts, const ranked *from,
                         const int64_t *column_of, int64_t columns, int64_t never, int64_t *costs, int64_t *dearest) {
    for (int64_t at = 0; at < count; at++) {
        int64_t *row = costs + at * columns, start = starts[numbers[at]], last = 0;
        for (int64_t i = 0; i < columns; i++) row[i] = never;
        for (int64_t i = 0; i < from->able[numbers[at]]; i++) {
            int64_t column = column_of[from->who[start + i]], score = from->scores[start + i];
            if (column < 0) continue;
            last = row[column] = score < never ? score : never - 1;
        }
        dearest[at] = last; /* best first, so it is the last one */
    }
}

/* The largest cost that is possible, and how many are. */
int64_t ichiba_rounds_most(const int64_t *costs, int64_t count, int64_t never, int64_t *most) {
    int64_t found = 0, largest = -1;
    for (int64_t i = 0; i < count; i++) {
        int possible = costs[i] < never;
        found += possible;
        largest = possible & (costs[i] > largest) ? costs[i] : largest;
    }
    *most = largest;
    return found;
}

/* Costs shifted to int32, `never` as `dear`. Returns the mean, rounded down, of the two in the middle of the possible
 * ones, which are below 2^(2 * MEDIAN_BITS), or 0. room: 2^MEDIAN_BITS numbers. */
int64_t ichiba_rounds_scale(const int64_t *costs, int64_t count, int64_t never, int64_t shift, int32_t dear,
                            int32_t *scaled, int64_t *room) {
    int64_t possible = 0, middles[2], size = 1 << MEDIAN_BITS;
    memset(room, 0, (size_t)size * sizeof *room);
    for (int64_t i = 0; i < count; i++) {
        int is = costs[i] < never;
        int32_t value = (int32_t)(costs[i] >> shift);
        scaled[i] = is ? value : dear;
        room[is ? value >> MEDIAN_BITS : 0] += is;
        possible += is;
    }
    if (!possible) return 0;
    int64_t ranks[2] = {(possible - 1) / 2, possible / 2}, highs[2];
    for (int which = 0; which < 2; which++) {
        int64_t high = 0;
        while (ranks[which] >= room[high]) ranks[which] -= room[high++];
        highs[which] = high;
    }
    for (int which = 0; which < 2; which++) {
        if (!which || highs[1] != highs[0]) {
            memset(room, 0, (size_t)size * sizeof *room);
            for (int64_t i = 0; i < count; i++)
                if (scaled[i] >> MEDIAN_BITS == highs[which] && scaled[i] != dear) room[scaled[i] & (size - 1)]++;
        }
        int64_t low = 0, rank = ranks[which];
        while (rank >= room[low]) rank -= room[low++];
        middles[which] = highs[which] << MEDIAN_BITS | low;
    }
    return (middles[0] + middles[1]) / 2;
}

/* What each pair is worth: its cost, with the little noise of market.assignment, below zero. */
void ichiba_rounds_worth(int32_t *scaled, int64_t rows, int64_t columns, int64_t step) {
    for (int64_t row = 0; row < rows; row++) {
        int64_t noise = row * 40503 % 65521;
        for (int64_t i = 0; i < columns; i++) {
            scaled[row * columns + i] = -(scaled[row * columns + i] + (int32_t)(noise * step >> 16));
            noise += 30241;
            noise -= noise >= 65521 ? 65521 : 0;
        }
    }
}

/* The largest of worth less price in each block of columns. */
WIDE static void largest(const int32_t *worth, const int32_t *prices, int64_t columns, int32_t *block_max) {
    for (int64_t first = 0; first < columns; first += BLOCK) {
        int64_t width = columns - first < BLOCK ? columns - first : BLOCK;
        int32_t most = INT32_MIN;
        for (int64_t i = 0; i < width; i++) {
            int32_t value = (int32_t)((uint32_t)worth[first + i] - (uint32_t)prices[first + i]);
            most = value > most ? value : most;
        }
        *block_max++ = most;
    }
}

/* Bids of all rows without a column at once, until every row has one or finds all too dear: market.assignment._auction.
 *
 * worth: (rows, columns); reserves, column_of: (rows); prices, holder, offered, by: (columns), prices of zero, holder,
 * by and column_of of -1; waiting: (2 * rows); block_max: (blocks). Each ends as the Python's.
 */
void ichiba_rounds_auction(const int32_t *worth, const int32_t *reserves, int64_t rows, int64_t columns, int32_t step,
                           int32_t *prices, int64_t *holder, int64_t *column_of, int32_t *offered, int64_t *by,
                           int64_t *waiting, int32_t *block_max) {
    int64_t left = rows, blocks = (columns + BLOCK - 1) / BLOCK, *wanted_by = waiting + rows;
    for (int64_t i = 0; i < rows; i++) waiting[i] = i;
    while (left) {
        int64_t staying = 0;
        for (int64_t at = 0; at < left; at++) {
            int64_t row = waiting[at], block = 0;
            const int32_t *own = worth + row * columns;
            int32_t reserve = -reserves[row], second = reserve;
            largest(own, prices, columns, block_max);
            for (int64_t i = 1; i < blocks; i++) block = block_max[i] > block_max[block] ? i : block;
            int32_t best = block_max[block];
            if (best < reserve) continue; /* it is left over: prices only rise */
            for (int64_t i = 0; i < blocks; i++)
                if (i != block && block_max[i] > second) second = block_max[i];
            int64_t wanted = -1, end = (block + 1) * BLOCK < columns ? (block + 1) * BLOCK : columns;
            for (int64_t i = block * BLOCK; i < end; i++) {
                int32_t value = (int32_t)((uint32_t)own[i] - (uint32_t)prices[i]);
                if (wanted < 0 && value == best) wanted = i;
                else if (value > second) second = value;
            }
            int32_t bid = (int32_t)((uint32_t)prices[wanted] + (uint32_t)best - (uint32_t)second + (uint32_t)step);
            waiting[staying] = row;
            wanted_by[staying++] = wanted;
            if (by[wanted] < 0 || bid > offered[wanted] || (bid == offered[wanted] && row < by[wanted])) {
                by[wanted] = row;
                offered[wanted] = bid;
            }
        }
        left = 0;
        for (int64_t at = 0; at < staying; at++) { /* in any order: each wants one column, and none of them holds one */
            int64_t row = waiting[at], wanted = wanted_by[at], before = holder[wanted];
            if (by[wanted] != row) {
                waiting[left++] = row;
                continue;
            }
            holder[wanted] = row;
            column_of[row] = wanted;
            prices[wanted] = offered[wanted];
            if (before < 0) continue;
            column_of[before] = -1;
            waiting[left++] = before;
        }
        for (int64_t at = 0; at < staying; at++) by[wanted_by[at]] = -1;
    }
}
