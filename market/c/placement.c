/* The moves of market/placement_anneal.py, compiled: the same draws, the same integers, the same plan.
 *
 * Every array belongs to numpy and is shared with the Python beside it; market/placement_state.py says what each holds
 * and is the home of every limit. All costs are whole numbers of one unit, so no order of summation moves a result.
 * Nothing here allocates beyond the stack: a group has at most 2048 devices.
 */
#include <stdint.h>
#include <string.h>

#define VERSION 1
#define GROUP_MAX 2048 /* devices of a group: params.PLACEMENT_DEVICES_MAX */
#define NEIGHBOURS 4   /* boundaries that a swap touches: two of each of two groups */

typedef struct {
    int64_t devices, groups, size, near_count, path_share, guided_share, near_share;
    const int32_t *partner, *hop, *work, *toll, *near;
    const int64_t *patience;
    int32_t *slots, *slot_of, *order, *place, *boundary, *tight, *matching;
    int64_t *rows, *sync, *slowest, *totals;
    uint8_t *known, *witness;
    int32_t *best_slots, *best_order;
    uint64_t *random;
} state;

/* What one swap would do to one boundary. rows/columns: the slot that changes there, or -1. */
typedef struct {
    int64_t pair;
    int32_t first, second, row, column, value, tight, bound, repaired;
} trial;

static uint64_t draw(state *s) {
    uint64_t x = *s->random;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return *s->random = x;
}

static int64_t below(state *s, int64_t count) { return (int64_t)(((draw(s) >> 32) * (uint64_t)count) >> 32); }

static int32_t hop(const state *s, int32_t a, int32_t b) { return s->hop[(int64_t)a * s->devices + b]; }

static const int32_t *group(const state *s, int32_t g) { return s->slots + (int64_t)g * s->size; }

static int64_t pair_of(const state *s, int64_t g, int64_t h) { return g < h ? g * s->groups + h : h * s->groups + g; }

/* --- bottleneck matchings --- */

/* The smallest largest edge of a path that frees `row` from its column and gives every row another one, if it is below
 * `most`: the columns it may pass are marked in `seen`, `cost` and `from` lead back from the goal. -1 where there is none. */
static int32_t reroute(const state *s, const int32_t *left, const int32_t *right, const int32_t *match,
                       const int32_t *holder, int32_t row, int32_t most, int32_t *cost, int32_t *from, uint8_t *seen) {
    int32_t size = (int32_t)s->size, goal = match[row];
    const int32_t *edges = s->hop + (int64_t)left[row] * s->devices;
    for (int32_t c = 0; c < size; c++) cost[c] = edges[right[c]], from[c] = row, seen[c] = 0;
    for (;;) {
        int32_t least = most, at = -1;
        for (int32_t c = 0; c < size; c++)
            if (!seen[c] && cost[c] < least) least = cost[c], at = c;
        if (at < 0) return -1;
        if (at == goal) return least;
        seen[at] = 1;
        edges = s->hop + (int64_t)left[holder[at]] * s->devices;
        for (int32_t c = 0; c < size; c++) {
            int32_t edge = edges[right[c]];
            if (edge < least) edge = least;
            if (!seen[c] && edge < cost[c]) cost[c] = edge, from[c] = holder[at];
        }
    }
}

/* Hall's witness that no perfect matching is below `value`: rows that reach, by cheaper edges, one column too few. */
static void testify(const state *s, const int32_t *holder, int32_t row, const uint8_t *seen, const int32_t *cost,
                    int32_t value, uint8_t *witness) {
    int64_t size = s->size;
    memset(witness, 0, (size_t)(2 * size));
    witness[row] = 1;
    for (int64_t c = 0; c < size; c++)
        if (seen[c] && cost[c] < value) witness[size + c] = 1, witness[holder[c]] = 1;
}

/* Make `match` (column of each row of groups g, h) one whose largest edge is least; return that edge. No perfect matching
 * is below `bound`. */
static int32_t settle(const state *s, int32_t g, int32_t h, int32_t *match, uint8_t *witness, int32_t *tight,
                      int32_t bound) {
    int32_t size = (int32_t)s->size, cost[GROUP_MAX], from[GROUP_MAX], holder[GROUP_MAX];
    uint8_t seen[GROUP_MAX];
    const int32_t *left = group(s, g), *right = group(s, h);
    for (int32_t i = 0; i < size; i++) holder[match[i]] = i;
    for (;;) {
        int32_t value = -1, row = 0;
        for (int32_t i = 0; i < size; i++) {
            int32_t edge = hop(s, left[i], right[match[i]]);
            if (edge > value) value = edge, row = i;
        }
        *tight = row;
        if (value <= bound) return value;
        int32_t column = match[row];
        int32_t found = reroute(s, left, right, match, holder, row, value, cost, from, seen);
        if (found < 0) {
            testify(s, holder, row, seen, cost, value, witness);
            return value;
        }
        if (found >= bound) testify(s, holder, row, seen, cost, found, witness);
        for (;;) {
            int32_t i = from[column], next = match[i];
            match[i] = column;
            holder[column] = i;
            if (i == row) break;
            column = next;
        }
    }
}

static int32_t boundary(state *s, int32_t g, int32_t h) {
    int64_t pair = pair_of(s, g, h), size = s->size;
    if (!s->known[pair]) {
        s->boundary[pair] = settle(s, g < h ? g : h, g < h ? h : g, s->matching + pair * size,
                                   s->witness + 2 * pair * size, s->tight + pair, -1);
        s->known[pair] = 1;
    }
    return s->boundary[pair];
}

/* Whether the witness of a boundary still stands after the devices in slots t->row and t->column changed. */
static int stands(const state *s, const trial *t) {
    int64_t size = s->size;
    const uint8_t *rows = s->witness + 2 * t->pair * size, *columns = rows + size;
    const int32_t *left = group(s, t->first), *right = group(s, t->second), value = s->boundary[t->pair];
    if (t->row >= 0 && rows[t->row])
        for (int64_t c = 0; c < size; c++)
            if (!columns[c] && hop(s, left[t->row], right[c]) < value) return 0;
    if (t->column >= 0 && !columns[t->column])
        for (int64_t i = 0; i < size; i++)
            if (rows[i] && hop(s, right[t->column], left[i]) < value) return 0;
    return 1;
}

static int32_t cheapest(const state *s, int32_t device, const int32_t *others) {
    int32_t least = hop(s, device, others[0]);
    for (int64_t i = 1; i < s->size; i++)
        if (hop(s, device, others[i]) < least) least = hop(s, device, others[i]);
    return least;
}

/* At least what the boundary will cost: its old value where the witness stands, and the newcomers' cheapest edges. */
static int32_t floor_of(const state *s, trial *t) {
    const int32_t *left = group(s, t->first), *right = group(s, t->second);
    int32_t least = t->bound = stands(s, t) ? s->boundary[t->pair] : -1;
    if (t->row >= 0) {
        int32_t edge = cheapest(s, left[t->row], right);
        if (edge > least) least = edge;
    }
    if (t->column >= 0) {
        int32_t edge = cheapest(s, right[t->column], left);
        if (edge > least) least = edge;
    }
    return least;
}

/* Whether the old matching is still a best one, so that the value stays: found without a search. */
static int unmoved(const state *s, trial *t) {
    const int32_t *left = group(s, t->first), *right = group(s, t->second);
    const int32_t *match = s->matching + t->pair * s->size, value = s->boundary[t->pair];
    if (t->bound != value) return 0;
    if (t->row >= 0 && hop(s, left[t->row], right[match[t->row]]) > value) return 0;
    if (t->column >= 0) {
        int32_t i = 0;
        while (match[i] != t->column) i++;
        if (hop(s, left[i], right[t->column]) > value) return 0;
    }
    t->value = value;
    t->tight = s->tight[t->pair];
    if (hop(s, left[t->tight], right[match[t->tight]]) != value)
        for (t->tight = 0; hop(s, left[t->tight], right[match[t->tight]]) != value;) t->tight++;
    return 1;
}

/* --- moves --- */

static void keep_best(state *s) {
    if (s->totals[0] >= s->totals[1]) return;
    s->totals[1] = s->totals[0];
    memcpy(s->best_slots, s->slots, (size_t)s->devices * sizeof *s->slots);
    memcpy(s->best_order, s->order, (size_t)s->groups * sizeof *s->order);
}

/* Row sums of group g, and the largest, once `comes` has taken slot `slot` from `goes`. */
static int64_t synced(const state *s, int64_t g, int64_t slot, int32_t goes, int32_t comes, int64_t *rows) {
    int64_t own = 0, most = 0;
    const int32_t *more = s->partner + (int64_t)comes * s->devices, *less = s->partner + (int64_t)goes * s->devices;
    for (int64_t i = 0; i < s->size; i++) {
        int32_t device = group(s, (int32_t)g)[i];
        if (g * s->size + i == slot) continue;
        rows[i] = s->rows[device] - less[device] + more[device];
        own += more[device];
        if (rows[i] > most) most = rows[i];
    }
    rows[slot - g * s->size] = own;
    return own > most ? own : most;
}

static int64_t slowest(const state *s, int64_t g, int64_t slot, int32_t comes) {
    int64_t most = s->work[comes];
    for (int64_t i = 0; i < s->size; i++)
        if (g * s->size + i != slot && s->work[group(s, (int32_t)g)[i]] > most) most = s->work[group(s, (int32_t)g)[i]];
    return most;
}

/* The boundaries of the path that touch group a or b (-1: no group), without their values. */
static int touched(const state *s, int64_t a, int64_t b, int64_t slot_a, int64_t slot_b, trial *trials) {
    int count = 0;
    for (int which = 0; which < 2; which++) {
        int64_t own = which ? b : a;
        if (own < 0) continue;
        for (int64_t at = s->place[own] - 1; at <= s->place[own] + 1; at += 2) {
            if (at < 0 || at >= s->groups || (which && s->order[at] == a)) continue;
            int64_t other = s->order[at], g = own < other ? own : other, h = own < other ? other : own;
            trial *t = trials + count++;
            t->first = (int32_t)g, t->second = (int32_t)h, t->pair = g * s->groups + h;
            t->row = g == a ? (int32_t)(slot_a - a * s->size) : g == b ? (int32_t)(slot_b - b * s->size) : -1;
            t->column = h == a ? (int32_t)(slot_a - a * s->size) : h == b ? (int32_t)(slot_b - b * s->size) : -1;
        }
    }
    return count;
}

/* The boundaries' exact values, added to *energy; 0 as soon as it passes `limit`. */
static int weigh(const state *s, trial *trials, int count, int64_t *energy, int64_t limit, int32_t *matches,
                 uint8_t *witnesses) {
    int64_t size = s->size;
    for (int q = 0; q < count; q++) {
        trials[q].value = floor_of(s, trials + q);
        *energy += trials[q].value;
        if (*energy > limit) return 0;
    }
    for (int q = 0; q < count; q++) {
        trial *t = trials + q;
        int32_t floor = t->value;
        t->repaired = !unmoved(s, t);
        if (t->repaired) {
            memcpy(matches + q * size, s->matching + t->pair * size, (size_t)size * sizeof *matches);
            memcpy(witnesses + 2 * q * size, s->witness + 2 * t->pair * size, (size_t)(2 * size));
            t->value = settle(s, t->first, t->second, matches + q * size, witnesses + 2 * q * size, &t->tight, t->bound);
        }
        *energy += t->value - floor;
        if (*energy > limit) return 0;
    }
    return 1;
}

static void adopt(state *s, const trial *trials, int count, const int32_t *matches, const uint8_t *witnesses) {
    int64_t size = s->size;
    for (int q = 0; q < count; q++) {
        const trial *t = trials + q;
        if (t->repaired) {
            memcpy(s->matching + t->pair * size, matches + q * size, (size_t)size * sizeof *matches);
            memcpy(s->witness + 2 * t->pair * size, witnesses + 2 * q * size, (size_t)(2 * size));
        }
        s->boundary[t->pair] = t->value;
        s->tight[t->pair] = t->tight;
        s->known[t->pair] = 1;
    }
}

/* Take the new row sums of a group, and forget what its boundaries cost. */
static void renew(state *s, int64_t g, int64_t sync, int64_t slow, const int64_t *rows) {
    for (int64_t i = 0; i < s->size; i++) s->rows[group(s, (int32_t)g)[i]] = rows[i];
    s->sync[g] = sync;
    s->slowest[g] = slow;
    for (int64_t h = 0; h < s->groups; h++) s->known[pair_of(s, g, h)] = 0;
}

/* Swap the devices of two slots of different groups, the second perhaps of a spare, unless it costs more than limit. */
static void swap_devices(state *s, int64_t slot_a, int64_t slot_b, int64_t limit) {
    int64_t rows_a[GROUP_MAX], rows_b[GROUP_MAX], a = slot_a / s->size, b = slot_b / s->size, sync_b = 0, slow_b = 0;
    int32_t x = s->slots[slot_a], y = s->slots[slot_b], matches[NEIGHBOURS * GROUP_MAX];
    uint8_t witnesses[2 * NEIGHBOURS * GROUP_MAX];
    trial trials[NEIGHBOURS];
    if (b >= s->groups) b = -1;
    int64_t sync_a = synced(s, a, slot_a, x, y, rows_a), slow_a = slowest(s, a, slot_a, y), before = 0;
    int64_t energy = s->totals[0] + slow_a - s->slowest[a];
    if (b >= 0) {
        sync_b = synced(s, b, slot_b, y, x, rows_b), slow_b = slowest(s, b, slot_b, x);
        energy += slow_b - s->slowest[b];
    } else
        energy += s->toll[y] - s->toll[x];
    int64_t after = sync_a > sync_b ? sync_a : sync_b;
    for (int64_t g = 0; g < s->groups; g++) {
        if (s->sync[g] > before) before = s->sync[g];
        if (g != a && g != b && s->sync[g] > after) after = s->sync[g];
    }
    energy += after - before;
    int count = touched(s, a, b, slot_a, slot_b, trials);
    for (int q = 0; q < count; q++) energy -= s->boundary[trials[q].pair];
    if (energy > limit) return;
    s->slots[slot_a] = y, s->slots[slot_b] = x;
    if (!weigh(s, trials, count, &energy, limit, matches, witnesses)) {
        s->slots[slot_a] = x, s->slots[slot_b] = y;
        return;
    }
    s->slot_of[x] = (int32_t)slot_b, s->slot_of[y] = (int32_t)slot_a;
    renew(s, a, sync_a, slow_a, rows_a);
    if (b >= 0)
        renew(s, b, sync_b, slow_b, rows_b);
    else
        s->rows[x] = 0;
    adopt(s, trials, count, matches, witnesses);
    s->totals[0] = energy;
    keep_best(s);
}

/* Turn a stretch of the path round. i < j: places. */
static void reverse(state *s, int64_t i, int64_t j, int64_t limit) {
    int32_t *order = s->order;
    int64_t energy = s->totals[0];
    if (i > 0) energy += boundary(s, order[i - 1], order[j]) - boundary(s, order[i - 1], order[i]);
    if (j < s->groups - 1) energy += boundary(s, order[i], order[j + 1]) - boundary(s, order[j], order[j + 1]);
    if (energy > limit) return;
    for (; i < j; i++, j--) {
        int32_t g = order[i];
        order[i] = order[j], order[j] = g;
        s->place[order[i]] = (int32_t)i, s->place[order[j]] = (int32_t)j;
    }
    s->totals[0] = energy;
    keep_best(s);
}

/* Take the group at place i out of the path and put it in at place j. */
static void relocate(state *s, int64_t i, int64_t j, int64_t limit) {
    int32_t *order = s->order, g = order[i];
    int64_t energy = s->totals[0], last = s->groups - 1, before = j > i ? j : j - 1, after = before + 1;
    if (i > 0) energy -= boundary(s, order[i - 1], g);
    if (i < last) energy -= boundary(s, g, order[i + 1]);
    if (i > 0 && i < last) energy += boundary(s, order[i - 1], order[i + 1]);
    if (before >= 0 && after <= last) energy -= boundary(s, order[before], order[after]);
    if (before >= 0) energy += boundary(s, order[before], g);
    if (after <= last) energy += boundary(s, g, order[after]);
    if (energy > limit) return;
    for (int64_t step = j > i ? 1 : -1; i != j; i += step) {
        order[i] = order[i + step];
        s->place[order[i]] = (int32_t)i;
    }
    order[j] = g;
    s->place[g] = (int32_t)j;
    s->totals[0] = energy;
    keep_best(s);
}

/* A slot that decides the cost: of a boundary's tightest pair, or of the group that takes longest to agree. */
static int64_t critical_slot(state *s, int64_t side) {
    int64_t at = below(s, s->groups), size = s->size;
    if (at < s->groups - 1) {
        int64_t pair = pair_of(s, s->order[at], s->order[at + 1]), row = s->tight[pair];
        return side ? pair / s->groups * size + row : pair % s->groups * size + s->matching[pair * size + row];
    }
    int64_t worst = 0, slot = 0;
    for (int64_t g = 1; g < s->groups; g++)
        if (s->sync[g] > s->sync[worst]) worst = g;
    for (int64_t i = 1; i < size; i++)
        if (s->rows[s->slots[worst * size + i]] > s->rows[s->slots[worst * size + slot]]) slot = i;
    return worst * size + slot;
}

static int64_t partner_slot(state *s, int64_t slot) {
    if ((int64_t)(draw(s) & 1023) < s->near_share) {
        int64_t rank = below(s, 1 + below(s, s->near_count));
        return s->slot_of[s->near[s->slots[slot] * s->near_count + rank]];
    }
    int64_t other = below(s, s->devices - s->size), start = slot / s->size * s->size;
    return other < start ? other : other + s->size;
}

static void move(state *s, int64_t temperature) {
    uint64_t word = draw(s);
    int64_t limit = s->totals[0] + ((temperature * s->patience[word >> 52]) >> 16);
    if (s->groups > 1 && (int64_t)(word & 1023) < s->path_share) {
        int64_t i = below(s, s->groups), j = below(s, s->groups), turned = (int64_t)(word >> 20) & 1;
        if (i == j) return;
        if (turned)
            reverse(s, i < j ? i : j, i < j ? j : i, limit);
        else
            relocate(s, i, j, limit);
        return;
    }
    int guided = (int64_t)((word >> 10) & 1023) < s->guided_share;
    int64_t slot = guided ? critical_slot(s, (int64_t)(word >> 20) & 1) : below(s, s->groups * s->size);
    int64_t other = partner_slot(s, slot);
    if (other / s->size != slot / s->size) swap_devices(s, slot, other, limit);
}

/* --- what Python calls --- */

int64_t ichiba_placement_version(void) { return VERSION; }

void ichiba_placement_anneal(state *s, int64_t moves, int64_t temperature) {
    for (int64_t done = 0; done < moves; done++) move(s, temperature);
}

int32_t ichiba_placement_boundary(state *s, int32_t g, int32_t h) { return boundary(s, g, h); }
