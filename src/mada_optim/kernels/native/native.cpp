// MADA's update and its hypergradient for a list of tensors, each in one pass over memory.
//
// The update is defined in family.py (MADAFamily) and omada.py, and differentiated in hypergradient.py; this file repeats
// both in closed form, for speed alone, and the tests hold it against them. It is compiled for one combination of these:
//
//   ADAPTIVE, SIGN   whether γ lets Adam's part and Lion's part of the direction in
//   MEAN, DIFF, YOGI whether ρ, β3, c may differ from where they change nothing
//   ORTHO            whether ω lets the orthogonalized momentum in (OMADA)
//   ROWS             whether ν mixes that with the one whose rows are normalized
//   PARAM, GRAD, STATE   C++ types of parameters, gradients and buffers;  REAL: of the arithmetic
//   STOCHASTIC       whether bfloat16 parameters are rounded stochastically, as buffers always are

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__clang__)
#define EACH _Pragma("clang loop vectorize(assume_safety)")
#else
#define EACH _Pragma("GCC ivdep")
#endif

struct bfloat16 { uint16_t bits; };

// What Python hands over (native.py mirrors it): one row for each parameter, null where there is no such tensor, ...
enum Role { PARAMETER, GRADIENT, PENDING, EXP_AVG, EXP_AVG_SQ, MEAN_EXP_AVG_SQ, EXP_AVG_DIFF, PREVIOUS, LION, ORTHOGONAL,
            NORMALIZED, ROLES };

struct Row {
    int64_t numel;
    int64_t seed;                        // of stochastic rounding
    void* data[ROLES];
};

// ... and the numbers of the step t that is computed.
struct Settings {
    double beta1, beta2, beta3, rho, c, gamma, ortho, row_norm;
    double eps, kappa1, kappa2, t, lr, weight_decay;
    int32_t maximize;
    int32_t keep;                        // mada_step: leave the moments as they are; mada_settle: that will be done
    int32_t stored;                      // mada_step with keep: mada_settle has stored the gradient already
    int32_t threads;
};

namespace {

constexpr int COEFFICIENTS = 8;          // β1, β2, β3, ρ, c, γ, ω, ν
constexpr int64_t TASK = 1 << 16;        // elements that a thread takes at a time
constexpr int64_t SUMMED = 1 << 12;      // elements that are summed in REAL before the sum goes on in double

// ---- Reading and writing numbers.

inline REAL read(bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <class T>
REAL read(T x) { return REAL(x); }

// 32 pseudorandom bits for an element: the finalizer of MurmurHash3 on a Weyl sequence.
inline uint32_t noise(uint32_t seed, uint32_t index) {
    uint32_t x = seed + index * 0x9E3779B9u;
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = (x ^ (x >> 13)) * 0xC2B2AE35u;
    return x ^ (x >> 16);
}

// To nearest even, or up with the probability that keeps the expectation.
template <bool RANDOM>
void write(bfloat16& to, REAL x, uint32_t seed, int64_t index) {
    const float value = x;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t carry = RANDOM ? noise(seed, uint32_t(index)) >> 16 : 0x7FFFu + ((bits >> 16) & 1u);
    const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
    const uint32_t quiet = (bits & 0x007FFFFFu) ? 0x00400000u : 0u;
    to.bits = uint16_t((finite ? bits + carry : bits | quiet) >> 16);
}

template <bool RANDOM, class T>
void write(T& to, REAL x, uint32_t, int64_t) { to = T(x); }

// ---- The mathematics, for one element.

// NaN where x is not finite. Not by adding 0 * x: without signed zeros g++ 12 takes that for 0 in loops that it vectorizes.
inline REAL where_finite(REAL x, REAL value) {
    return std::abs(x) <= std::numeric_limits<REAL>::max() ? value : std::numeric_limits<REAL>::quiet_NaN();
}

// Gradients that would overflow are cut to the largest safe one; what is not finite becomes NaN. See cut() in family.py.
inline REAL cut(REAL g) {
    const REAL largest = std::sqrt(std::numeric_limits<REAL>::max()) / 256;
    return where_finite(g, std::min(std::max(g, -largest), largest));
}

inline REAL sign(REAL x) { return REAL(x > 0) - REAL(x < 0); }

// Coefficients in the precision of the arithmetic, and what the bias corrections make of them.
struct Coefficients {
    REAL beta1, beta2, beta3, rho, c, gamma, ortho, row_norm, eps, kappa1, kappa2;
    REAL not_beta1, not_beta2, not_beta3, not_rho, not_c, not_gamma, not_ortho, not_row_norm;  // 1 - ...
    REAL not_kappa1, not_kappa2;
    REAL share;                          // 1/t
    REAL later;                          // 1 after the first step: d_1 = 0
    REAL unbias1, unbias2;               // 1/(1-β1^t), 1/(1-β2^t)
    REAL drift1, drift2;                 // t β1^{t-1}/(1-β1^t)², t β2^{t-1}/(1-β2^t)
    REAL V_by_v, V_by_target;            // ∂V/∂v, (1-β2) ∂V/∂v

    explicit Coefficients(const Settings& q)
        : beta1(q.beta1), beta2(q.beta2), beta3(q.beta3), rho(q.rho), c(q.c), gamma(q.gamma), ortho(q.ortho),
          row_norm(q.row_norm), eps(q.eps), kappa1(q.kappa1), kappa2(q.kappa2), not_beta1(1 - q.beta1),
          not_beta2(1 - q.beta2), not_beta3(1 - q.beta3), not_rho(1 - q.rho), not_c(1 - q.c), not_gamma(1 - q.gamma),
          not_ortho(1 - q.ortho), not_row_norm(1 - q.row_norm), not_kappa1(1 - q.kappa1), not_kappa2(1 - q.kappa2),
          share(1 / q.t), later(q.t > 1) {
        const double bias1 = 1 - std::pow(q.beta1, q.t), bias2 = 1 - std::pow(q.beta2, q.t);
        unbias1 = 1 / bias1, unbias2 = 1 / bias2;
        drift1 = q.t * std::pow(q.beta1, q.t - 1) / (bias1 * bias1), drift2 = q.t * std::pow(q.beta2, q.t - 1) / bias2;
        V_by_v = (MEAN ? q.rho + (1 - q.rho) / q.t : 1) / bias2;
        V_by_target = V_by_v * (1 - q.beta2);
    }

    // What the sums of Derivatives must be multiplied by.
    void scale(double* sums) const {
        const double inner = ORTHO ? not_ortho : 1, outer = inner * (SIGN ? gamma : 1);
        sums[0] *= outer, sums[1] *= -outer / 2, sums[2] *= outer, sums[3] *= -outer / 2 * unbias2;
        sums[4] *= -outer / 2 * V_by_target, sums[5] *= inner, sums[7] *= ortho;
    }
};

// m, v, v̄, n, g of the last step, l; O and N of this one.
struct Moments { REAL m, v, mean, n, previous, lion, ortho, normalized; };

// One step, with everything that its derivatives need. (What they do not need, the compiler leaves out.)
struct Step {
    REAL m_change, n_change, v_change, d, lookahead, square, square_sign, yogi_change, mean_change;
    REAL V, root, inverse, a, u, inner, whole, delta;
    Moments next;
};

inline Step take(const Coefficients& q, const Moments& s, REAL g) {
    Step x{};
    if constexpr (ADAPTIVE) {
        x.m_change = s.m - g;
        x.next.m = q.beta1 * s.m + q.not_beta1 * g;
        REAL numerator = x.next.m * q.unbias1;
        x.lookahead = g;
        if constexpr (DIFF) {
            x.d = q.later * (g - s.previous);
            x.n_change = s.n - x.d;
            x.next.n = q.beta3 * s.n + q.not_beta3 * x.d;
            x.lookahead = g + q.beta3 * x.d;
            numerator += q.beta3 * x.next.n;
        }
        x.square = x.lookahead * x.lookahead;
        REAL target = x.square;
        if constexpr (YOGI) {
            x.square_sign = sign(x.square - s.v);
            const REAL yogi = s.v + x.square_sign * x.square;
            x.yogi_change = x.square - yogi;
            target = q.c * x.square + q.not_c * yogi;
        }
        x.v_change = s.v - target;
        x.next.v = q.beta2 * s.v + q.not_beta2 * target;
        REAL v = x.next.v;
        if constexpr (MEAN) {
            x.next.mean = s.mean + (v - s.mean) * q.share;
            x.mean_change = v - x.next.mean;
            v = q.rho * v + q.not_rho * x.next.mean;
        }
        x.V = v * q.unbias2;
        x.root = std::sqrt(x.V);
        x.inverse = 1 / (x.root + q.eps);
        x.a = x.delta = numerator * x.inverse;
    }
    if constexpr (SIGN) {
        const REAL mixed = q.kappa1 * s.lion + q.not_kappa1 * g;
        x.u = x.delta = where_finite(mixed, sign(mixed));
        x.next.lion = q.kappa2 * s.lion + q.not_kappa2 * g;
    }
    if constexpr (ADAPTIVE && SIGN) x.delta = q.gamma * x.a + q.not_gamma * x.u;
    x.inner = x.delta;
    if constexpr (ORTHO) {
        x.whole = ROWS ? q.not_row_norm * s.ortho + q.row_norm * s.normalized : s.ortho;
        x.delta = q.not_ortho * x.inner + q.ortho * x.whole;
    }
    x.next.previous = g;
    return x;
}

// w ∂Δ_t/∂q for w the next gradient, but for factors that are the same for all elements: see scale().
struct Derivatives { REAL beta1, beta2, beta3, rho, c, gamma, ortho, row_norm; };

inline Derivatives differentiate(const Coefficients& q, const Moments& s, const Step& x, REAL w) {
    Derivatives by{};
    if constexpr (ADAPTIVE) {
        const REAL by_numerator = w * x.inverse;
        const REAL by_V = x.V > 0 ? by_numerator * x.a / x.root : REAL(0);  // times -1/2
        by.beta1 = by_numerator * (x.m_change * q.unbias1 + x.next.m * q.drift1);
        by.beta2 = by_V * (x.v_change * q.V_by_v + x.V * q.drift2);
        if constexpr (DIFF) {
            REAL along_square = by_V * x.lookahead * x.d;
            if constexpr (YOGI) along_square *= q.c + q.not_c * x.square_sign;
            by.beta3 = by_numerator * (x.next.n + q.beta3 * x.n_change) - q.V_by_target * along_square;
        }
        if constexpr (MEAN) by.rho = by_V * x.mean_change;
        if constexpr (YOGI) by.c = by_V * x.yogi_change;
    }
    if constexpr (ADAPTIVE && SIGN) by.gamma = w * (x.a - x.u);
    if constexpr (ORTHO) by.ortho = w * (x.whole - x.inner);
    if constexpr (ORTHO && ROWS) by.row_norm = w * (s.normalized - s.ortho);
    return by;
}

// ---- Passes over a range of one tensor.

// The tensors of a row, with their types.
struct Tensors {
    PARAM* param;
    GRAD* grad;
    STATE *pending, *m, *v, *mean, *n, *previous, *lion, *ortho, *normalized;
    uint32_t seed;

    explicit Tensors(const Row& row)
        : param(static_cast<PARAM*>(row.data[PARAMETER])), grad(static_cast<GRAD*>(row.data[GRADIENT])),
          pending(state(row, PENDING)), m(state(row, EXP_AVG)), v(state(row, EXP_AVG_SQ)),
          mean(state(row, MEAN_EXP_AVG_SQ)), n(state(row, EXP_AVG_DIFF)), previous(state(row, PREVIOUS)),
          lion(state(row, LION)), ortho(state(row, ORTHOGONAL)), normalized(state(row, NORMALIZED)),
          seed(uint32_t(row.seed)) {}

    static STATE* state(const Row& row, Role role) { return static_cast<STATE*>(row.data[role]); }

    Moments moments(int64_t i) const {
        Moments s{};
        if constexpr (ADAPTIVE) s.m = read(m[i]), s.v = read(v[i]);
        if constexpr (MEAN) s.mean = read(mean[i]);
        if constexpr (DIFF) s.n = read(n[i]), s.previous = read(previous[i]);
        if constexpr (SIGN) s.lion = read(lion[i]);
        if constexpr (ORTHO) s.ortho = read(ortho[i]);
        if constexpr (ORTHO && ROWS) s.normalized = read(normalized[i]);
        return s;
    }

    void store(STATE* to, Role role, int64_t i, REAL value) const {
        write<true>(to[i], value, seed + role, i);
    }

    void store(int64_t i, const Moments& s) const {
        if constexpr (ADAPTIVE) store(m, EXP_AVG, i, s.m), store(v, EXP_AVG_SQ, i, s.v);
        if constexpr (MEAN) store(mean, MEAN_EXP_AVG_SQ, i, s.mean);
        if constexpr (DIFF) store(n, EXP_AVG_DIFF, i, s.n);
        if constexpr (SIGN) store(lion, LION, i, s.lion);
    }
};

// The pending step: its derivatives along the next gradient, then its moments. A next gradient that will be kept takes
// the place of the previous one, which has just been read; Python exchanges the two.
template <bool KEEP>
void settle(const Coefficients& given, const Settings& settings, const Row& row, int64_t start, int64_t end, double* sums) {
    const Coefficients q = given;
    const Tensors tensors(row);
    const REAL orientation = settings.maximize ? -1 : 1;
    REAL beta1 = 0, beta2 = 0, beta3 = 0, rho = 0, c = 0, gamma = 0, ortho = 0, row_norm = 0;
    EACH
    for (int64_t i = start; i < end; ++i) {
        const REAL g = cut(read(tensors.pending[i])), next = orientation * read(tensors.grad[i]);
        const Moments before = tensors.moments(i);
        const Step x = take(q, before, g);
        const Derivatives by = differentiate(q, before, x, next);
        beta1 += by.beta1, beta2 += by.beta2, beta3 += by.beta3, rho += by.rho, c += by.c, gamma += by.gamma;
        ortho += by.ortho, row_norm += by.row_norm;
        tensors.store(i, x.next);
        if constexpr (DIFF && KEEP) tensors.store(tensors.previous, PREVIOUS, i, cut(next));
    }
    const REAL all[COEFFICIENTS] = {beta1, beta2, beta3, rho, c, gamma, ortho, row_norm};
    for (int k = 0; k < COEFFICIENTS; ++k) sums[k] += all[k];
}

// The moments of the pending step alone, where no next gradient came.
void advance(const Coefficients& given, const Settings&, const Row& row, int64_t start, int64_t end, double*) {
    const Coefficients q = given;
    const Tensors tensors(row);
    EACH
    for (int64_t i = start; i < end; ++i)
        tensors.store(i, take(q, tensors.moments(i), cut(read(tensors.pending[i]))).next);
}

// The step of the parameters.
template <bool KEEP, bool STORED>
void step(const Coefficients& given, const Settings& settings, const Row& row, int64_t start, int64_t end, double*) {
    const Coefficients q = given;
    const Tensors tensors(row);
    const REAL orientation = settings.maximize ? -1 : 1, lr = settings.lr, decay = 1 - settings.lr * settings.weight_decay;
    EACH
    for (int64_t i = start; i < end; ++i) {
        const REAL g = cut(orientation * read(tensors.grad[i]));
        const Step x = take(q, tensors.moments(i), g);
        write<STOCHASTIC>(tensors.param[i], read(tensors.param[i]) * decay - lr * x.delta, tensors.seed, i);
        if constexpr (!KEEP) tensors.store(i, x.next);
        if constexpr (KEEP && !STORED) tensors.store(tensors.pending, PENDING, i, g);
        if constexpr (!KEEP && DIFF) tensors.store(tensors.previous, PREVIOUS, i, g);
    }
}

template <class Pass>
void run(const Settings& settings, const Row* rows, int64_t count, double* sums, Pass pass) {
    struct Task { int64_t row, start, end; };
    std::vector<Task> tasks;
    for (int64_t row = 0; row < count; ++row)
        for (int64_t start = 0; start < rows[row].numel; start += TASK)
            tasks.push_back({row, start, std::min(start + TASK, rows[row].numel)});
    const Coefficients q(settings);
    // One sum for each task, added up in order at the end: the result does not depend on the threads.
    std::vector<double> partial(tasks.size() * COEFFICIENTS, 0.0);
#pragma omp parallel for schedule(dynamic, 1) num_threads(settings.threads)
    for (size_t k = 0; k < tasks.size(); ++k) {
        const Task task = tasks[k];
        const Row row = rows[task.row];
        for (int64_t start = task.start; start < task.end; start += SUMMED)
            pass(q, settings, row, start, std::min(start + SUMMED, task.end), &partial[k * COEFFICIENTS]);
    }
    if (sums)
        for (size_t k = 0; k < partial.size(); ++k) sums[k % COEFFICIENTS] += partial[k];
}

}  // namespace

extern "C" {

// What of family.py is written out here and in native.py, in the order of Settings and Role; agreement.py compares.
const char* mada_implements() {
    return "coefficients: beta1 beta2 beta3 rho c gamma ortho row_norm\n"
           "buffers: exp_avg exp_avg_sq mean_exp_avg_sq exp_avg_diff previous_grad lion_exp_avg ortho ortho_normalized\n"
           "buffers: ortho_exp_avg\n"                  // prepare() alone reads and writes it
           "constants: eps lion_betas\n"
           "constants: matrices split ortho_momentum row_beta\n"  // these and the next matter to prepare() and buffers() alone
           "constants: ns_steps ns_coefficients adjust_lr_fn\n"
           "definition: f26783fe9240e8c6\n";           // the checksum of the methods, see CONTRIBUTING.md
}

void mada_settle(const Settings* settings, const Row* rows, int64_t count, double* sums) {
    run(*settings, rows, count, sums, settings->keep ? settle<true> : settle<false>);
    Coefficients(*settings).scale(sums);
}

void mada_advance(const Settings* settings, const Row* rows, int64_t count) {
    run(*settings, rows, count, nullptr, advance);
}

void mada_step(const Settings* settings, const Row* rows, int64_t count) {
    const auto keeping = settings->stored ? step<true, true> : step<true, false>;
    run(*settings, rows, count, nullptr, settings->keep ? keeping : step<false, false>);
}

}  // extern "C"
