/* A large round in one pass over its bids, and its auction, compiled: the same whole numbers as the arrays of
 * market/scoring.py and market/assignment.py, which say what each step means.
 *
 * Every array belongs to numpy; nothing here allocates. The bounds that keep 64 bits enough are `fits` of
 * market/scoring.py, checked before. Divisions are of non-negative numbers.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define VERSION 1
#define FIELDS 9 /* of a packed bid: market.scoring.pack_bid */
#define HOUR_NS 3600000000000LL
#define DIGIT_BITS 11
#define DIGITS (1 << DIGIT_BITS)
#define BLOCK 64 /* columns whose largest value is kept: one of them is looked through again */

#if defined(__x86_64__) && defined(__gnu_linux__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

int64_t ichiba_rounds_version(void) { return VERSION; }

typedef struct { /* what a bid is held against; market.round_compiled._TERMS names the same in order */
    int64_t unit_price_max, operations, moved_bytes, sandbox, device_memory, longest_ns, lock, stake, device, giga, rest,
        hour_micro, long_ns;
} terms;

typedef struct { /* market.scoring.Bidders, in order of their heads; the rest is room for what follows for one offer */
    int64_t count, speeds_count, links_count;
    const uint64_t *heads;
    const int64_t *stake, *doubt_ppm, *slowdown, *speed, *link, *speeds, *links;
    int64_t *floors_ns, *moving_ns, *moving_micro;
} bidders;

typedef struct {
    uint64_t head;
    int64_t score;
    int32_t row, who;
} found;

/* The place of a head, or where it would stand: no branch that a processor could guess wrong. */
static int64_t place_of(const uint64_t *heads, int64_t count, uint64_t head) {
    const uint64_t *base = heads;
    while (count > 1) {
        int64_t half = count / 2;
        base += (base[half - 1] < head) * half;
        count -= half;
    }
    return base - heads;
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

/* The feasible ones of `count` packed bids, best first by score and head, and the places of the refused.
 *
 * may: whether a bidder may have the job at all. out: four rows of `count`: row, solver, score of the feasible, then
 * the rows of the refused. scratch: 2 * count of `found`. b->moving_micro is left as it is for this offer.
 * Returns how many are feasible, or -1 where two tied bids have one head, -2 where a solver is not among the bidders.
 */
int64_t ichiba_rounds_rank(const terms *t, const int64_t *packed, int64_t count, const bidders *b, const uint8_t *may,
                           int64_t *out, found *scratch) {
    int64_t able = 0, refused = 0;
    uint64_t most = 0;
    if (b->count < 1 && count > 0) return -2;
    for (int64_t i = 0; i < b->speeds_count; i++) b->floors_ns[i] = nano_over(t->operations, b->speeds[i], t->long_ns);
    for (int64_t i = 0; i < b->links_count; i++) {
        int64_t ns = b->moving_ns[i] = nano_over(t->moved_bytes, b->links[i], t->long_ns);
        b->moving_micro[i] = ns > t->longest_ns ? 0 : hourly(t->hour_micro, ns);
    }
    for (int64_t row = 0; row < count; row++) {
        const int64_t *bid = packed + row * FIELDS;
        int64_t unit_price = bid[2], cap = bid[3], lock = bid[4], eta = bid[5];
        int64_t who = place_of(b->heads, b->count, (uint64_t)bid[1]);
        if (b->heads[who] != (uint64_t)bid[1]) return -2;
        int64_t run_ns = permille(eta < t->long_ns ? eta : t->long_ns, b->slowdown[who]);
        if (run_ns < b->floors_ns[b->speed[who]]) run_ns = b->floors_ns[b->speed[who]];
        int64_t takes_ns = run_ns + b->moving_ns[b->link[who]], stake = b->stake[who];
        if (!may[who] | (unit_price > t->unit_price_max) | (cap < t->operations) | (bid[6] < t->sandbox) |
            (bid[8] < t->device_memory) | (takes_ns > t->longest_ns) | (lock < t->lock) | (stake < t->stake) |
            (lock > stake) | ((t->device >= 0) & (bid[7] != t->device))) {
            out[3 * count + refused++] = row;
            continue;
        }
        int64_t price = t->giga * unit_price + t->rest * unit_price / 1000000000;
        int64_t risk = price * b->doubt_ppm[who] / 1000000;
        int64_t score = price + risk + hourly(t->hour_micro, run_ns) + b->moving_micro[b->link[who]];
        scratch[able++] = (found){(uint64_t)bid[0], score, (int32_t)row, (int32_t)who};
        most |= (uint64_t)score;
    }
    found *best = sorted(scratch, scratch + count, able, most);
    for (int64_t first = 0, last; first < able; first = last) {
        for (last = first + 1; last < able && best[last].score == best[first].score; last++) {}
        if (last - first < 2) continue;
        if (last - first < 24) insert_by_head(best + first, last - first);
        else qsort(best + first, (size_t)(last - first), sizeof(found), by_head);
        for (int64_t i = first + 1; i < last; i++)
            if (best[i].head == best[i - 1].head) return -1;
    }
    for (int64_t i = 0; i < able; i++) {
        out[i] = best[i].row;
        out[count + i] = best[i].who;
        out[2 * count + i] = best[i].score;
    }
    return able;
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

/* Costs shifted to int32, `never` as `dear`; the possible ones also one after the other. */
void ichiba_rounds_scale(const int64_t *costs, int64_t count, int64_t never, int64_t shift, int32_t dear,
                         int32_t *scaled, int32_t *possible) {
    for (int64_t i = 0; i < count; i++) {
        int is = costs[i] < never;
        int32_t value = (int32_t)(costs[i] >> shift);
        scaled[i] = is ? value : dear;
        *possible = value;
        possible += is;
    }
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
 * worth: (rows, columns); reserves, column_of: (rows); prices, holder, offered, by: (columns), prices of zero, holder
 * and column_of of -1; waiting: (rows); block_max: (columns / 64 + 1); out: (rows), zero. Each ends as the Python's.
 */
void ichiba_rounds_auction(const int32_t *worth, const int32_t *reserves, int64_t rows, int64_t columns, int32_t step,
                           int32_t *prices, int64_t *holder, int64_t *column_of, int32_t *offered, int64_t *by,
                           int64_t *waiting, int32_t *block_max, uint8_t *out) {
    int64_t left = rows, blocks = (columns + BLOCK - 1) / BLOCK;
    for (int64_t i = 0; i < rows; i++) waiting[i] = i;
    for (int64_t i = 0; i < columns; i++) by[i] = -1;
    while (left) {
        for (int64_t at = 0; at < left; at++) {
            int64_t row = waiting[at], block = 0;
            const int32_t *own = worth + row * columns;
            int32_t reserve = -reserves[row], second = reserve;
            largest(own, prices, columns, block_max);
            for (int64_t i = 1; i < blocks; i++) block = block_max[i] > block_max[block] ? i : block;
            int32_t best = block_max[block];
            if (best < reserve) {
                out[row] = 1;
                continue;
            }
            for (int64_t i = 0; i < blocks; i++)
                if (i != block && block_max[i] > second) second = block_max[i];
            int64_t wanted = -1, end = (block + 1) * BLOCK < columns ? (block + 1) * BLOCK : columns;
            for (int64_t i = block * BLOCK; i < end; i++) {
                int32_t value = (int32_t)((uint32_t)own[i] - (uint32_t)prices[i]);
                if (wanted < 0 && value == best) wanted = i;
                else if (value > second) second = value;
            }
            int32_t bid = (int32_t)((uint32_t)prices[wanted] + (uint32_t)best - (uint32_t)second + (uint32_t)step);
            if (by[wanted] < 0 || bid > offered[wanted]) { /* rows come in order: the smaller one keeps a tie */
                by[wanted] = row;
                offered[wanted] = bid;
            }
        }
        for (int64_t i = 0; i < columns; i++) {
            if (by[i] < 0) continue;
            if (holder[i] >= 0) column_of[holder[i]] = -1;
            holder[i] = by[i];
            column_of[by[i]] = i;
            prices[i] = offered[i];
            by[i] = -1;
        }
        left = 0;
        for (int64_t row = 0; row < rows; row++)
            if (column_of[row] < 0 && !out[row]) waiting[left++] = row;
    }
}
