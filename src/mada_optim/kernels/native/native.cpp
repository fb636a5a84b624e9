// MADA's update and its hypergradient for a list of tensors, each in one pass over memory.
//
// families/mada.py and families/orthogonal.py define the update, learning/hypergradient.py differentiates it. This file repeats
// both in closed form, for speed alone, and the tests hold it against them. layout.py writes two lists above it, which
// Python uses, too: EACH_COEFFICIENT(X) is X(name) for each coefficient, EACH_BUFFER(X) for each tensor that is kept for a
// parameter. A new name in one of them is declared, handed over and summed up everywhere below. What it means is said in
// take() and differentiate(). The file is compiled for one combination of these:
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

// What Python hands over (executor.py mirrors it): one row for each parameter, null where there is no such tensor, ...
#define ROLE_OF(name) role_##name,
enum Role { role_param, role_grad, EACH_BUFFER(ROLE_OF) ROLES };

struct Row {
    int64_t numel;
    int64_t seed;                        // of stochastic rounding
    void* data[ROLES];
};

// ... and the numbers of the step t that is computed.
#define DOUBLE(name) double name;
struct Settings {
    EACH_COEFFICIENT(DOUBLE)
    double eps, kappa1, kappa2, t, lr, weight_decay;
    int32_t maximize;
    int32_t keep;                        // mada_step: leave the moments as they are; mada_complete: that will be done
    int32_t stored;                      // mada_step with keep: mada_complete has stored the gradient already
    int32_t threads;
};

// What it gives back: one sum for each coefficient.
struct Sums { EACH_COEFFICIENT(DOUBLE) };

namespace {

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

// Gradients that would overflow are cut to the largest safe one; what is not finite becomes NaN. See cut() in families/numerics.py.
inline REAL cut(REAL g) {
    const REAL largest = std::sqrt(std::numeric_limits<REAL>::max()) / 256;
    return where_finite(g, std::min(std::max(g, -largest), largest));
}

inline REAL sign(REAL x) { return REAL(x > 0) - REAL(x < 0); }

// Coefficients q and 1 - q in the precision of the arithmetic, and what the bias corrections make of them.
#define REAL_OF(name) REAL name;
#define REAL_OF_REST(name) REAL not_##name;
#define TAKE_OVER(name) name = q.name, not_##name = 1 - q.name;
struct Coefficients {
    EACH_COEFFICIENT(REAL_OF)
    EACH_COEFFICIENT(REAL_OF_REST)
    REAL eps, kappa1, kappa2, not_kappa1, not_kappa2;
    REAL share;                          // 1/t
    REAL later;                          // 1 after the first step: d_1 = 0
    REAL unbias1, unbias2;               // 1/(1-β1^t), 1/(1-β2^t)
    REAL drift1, drift2;                 // t β1^{t-1}/(1-β1^t)², t β2^{t-1}/(1-β2^t)
    REAL V_by_v, V_by_target;            // ∂V/∂v, (1-β2) ∂V/∂v

    explicit Coefficients(const Settings& q)
        : eps(q.eps), kappa1(q.kappa1), kappa2(q.kappa2), not_kappa1(1 - q.kappa1), not_kappa2(1 - q.kappa2),
          share(1 / q.t), later(q.t > 1) {
        EACH_COEFFICIENT(TAKE_OVER)
        const double bias1 = 1 - std::pow(q.beta1, q.t), bias2 = 1 - std::pow(q.beta2, q.t);
        unbias1 = 1 / bias1, unbias2 = 1 / bias2;
        drift1 = q.t * std::pow(q.beta1, q.t - 1) / (bias1 * bias1), drift2 = q.t * std::pow(q.beta2, q.t - 1) / bias2;
        V_by_v = (MEAN ? q.rho + (1 - q.rho) / q.t : 1) / bias2;
        V_by_target = V_by_v * (1 - q.beta2);
    }

    // What the sums of Derivatives must be multiplied by.
    void scale(Sums& by) const {
        const double inner = ORTHO ? not_ortho : 1, outer = inner * (SIGN ? gamma : 1);
        by.beta1 *= outer, by.beta2 *= -outer / 2, by.beta3 *= outer, by.rho *= -outer / 2 * unbias2;
        by.c *= -outer / 2 * V_by_target, by.gamma *= inner, by.row_norm *= ortho;
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
struct Derivatives { EACH_COEFFICIENT(REAL_OF) };

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
#define STATE_OF(name) STATE* name;
#define STATE_IN(name) name(static_cast<STATE*>(row.data[role_##name])),
struct Tensors {
    PARAM* param;
    GRAD* grad;
    EACH_BUFFER(STATE_OF)
    uint32_t seed;

    explicit Tensors(const Row& row)
        : param(static_cast<PARAM*>(row.data[role_param])), grad(static_cast<GRAD*>(row.data[role_grad])),
          EACH_BUFFER(STATE_IN) seed(uint32_t(row.seed)) {}

    Moments moments(int64_t i) const {
        Moments s{};
        if constexpr (ADAPTIVE) s.m = read(exp_avg[i]), s.v = read(exp_avg_sq[i]);
        if constexpr (MEAN) s.mean = read(mean_exp_avg_sq[i]);
        if constexpr (DIFF) s.n = read(exp_avg_diff[i]), s.previous = read(previous_grad[i]);
        if constexpr (SIGN) s.lion = read(lion_exp_avg[i]);
        if constexpr (ORTHO) s.ortho = read(ortho[i]);
        if constexpr (ORTHO && ROWS) s.normalized = read(ortho_normalized[i]);
        return s;
    }

    void store(STATE* to, Role role, int64_t i, REAL value) const {
        write<true>(to[i], value, seed + role, i);
    }

    void store(int64_t i, const Moments& s) const {
        if constexpr (ADAPTIVE) store(exp_avg, role_exp_avg, i, s.m), store(exp_avg_sq, role_exp_avg_sq, i, s.v);
        if constexpr (MEAN) store(mean_exp_avg_sq, role_mean_exp_avg_sq, i, s.mean);
        if constexpr (DIFF) store(exp_avg_diff, role_exp_avg_diff, i, s.n);
        if constexpr (SIGN) store(lion_exp_avg, role_lion_exp_avg, i, s.lion);
    }
};

// The pending step: its derivatives along the next gradient, then its moments. A next gradient that will be kept takes
// the place of the previous one, which has just been read; Python exchanges the two.
#define ZERO(name) REAL name = 0;
#define ADD(name) name += by.name;
#define ADD_UP(name) sums->name += name;
template <bool KEEP>
void complete(const Coefficients& given, const Settings& settings, const Row& row, int64_t start, int64_t end, Sums* sums) {
    const Coefficients q = given;
    const Tensors tensors(row);
    const REAL orientation = settings.maximize ? -1 : 1;
    EACH_COEFFICIENT(ZERO)
    EACH
    for (int64_t i = start; i < end; ++i) {
        const REAL g = cut(read(tensors.pending_grad[i])), next = orientation * read(tensors.grad[i]);
        const Moments before = tensors.moments(i);
        const Step x = take(q, before, g);
        const Derivatives by = differentiate(q, before, x, next);
        EACH_COEFFICIENT(ADD)
        tensors.store(i, x.next);
        if constexpr (DIFF && KEEP) tensors.store(tensors.previous_grad, role_previous_grad, i, cut(next));
    }
    EACH_COEFFICIENT(ADD_UP)
}

// The moments of the pending step alone, where no next gradient came.
void advance(const Coefficients& given, const Settings&, const Row& row, int64_t start, int64_t end, Sums*) {
    const Coefficients q = given;
    const Tensors tensors(row);
    EACH
    for (int64_t i = start; i < end; ++i)
        tensors.store(i, take(q, tensors.moments(i), cut(read(tensors.pending_grad[i]))).next);
}

// The step of the parameters.
template <bool KEEP, bool STORED>
void step(const Coefficients& given, const Settings& settings, const Row& row, int64_t start, int64_t end, Sums*) {
    const Coefficients q = given;
    const Tensors tensors(row);
    const REAL orientation = settings.maximize ? -1 : 1, lr = settings.lr, decay = 1 - settings.lr * settings.weight_decay;
    EACH
    for (int64_t i = start; i < end; ++i) {
        const REAL g = cut(orientation * read(tensors.grad[i]));
        const Step x = take(q, tensors.moments(i), g);
        write<STOCHASTIC>(tensors.param[i], read(tensors.param[i]) * decay - lr * x.delta, tensors.seed, i);
        if constexpr (!KEEP) tensors.store(i, x.next);
        if constexpr (KEEP && !STORED) tensors.store(tensors.pending_grad, role_pending_grad, i, g);
        if constexpr (!KEEP && DIFF) tensors.store(tensors.previous_grad, role_previous_grad, i, g);
    }
}

// The pending step and the one after it, whose coefficients are known already: as complete() and step(), in one pass.
template <bool KEEP>
void complete_and_step(
    const Coefficients& pending, const Coefficients& given, const Settings& settings, const Row& row, int64_t start, int64_t end,
    Sums* sums) {
    const Coefficients earlier = pending, q = given;
    const Tensors tensors(row);
    const REAL orientation = settings.maximize ? -1 : 1, lr = settings.lr, decay = 1 - settings.lr * settings.weight_decay;
    EACH_COEFFICIENT(ZERO)
    EACH
    for (int64_t i = start; i < end; ++i) {
        const REAL next = orientation * read(tensors.grad[i]), g = cut(next);
        const Moments before = tensors.moments(i);
        const Step x = take(earlier, before, cut(read(tensors.pending_grad[i])));
        const Derivatives by = differentiate(earlier, before, x, next);
        EACH_COEFFICIENT(ADD)
        const Step y = take(q, x.next, g);
        write<STOCHASTIC>(tensors.param[i], read(tensors.param[i]) * decay - lr * y.delta, tensors.seed, i);
        tensors.store(i, KEEP ? x.next : y.next);
        if constexpr (DIFF) tensors.store(tensors.previous_grad, role_previous_grad, i, g);
        if constexpr (KEEP && !DIFF) tensors.store(tensors.pending_grad, role_pending_grad, i, g);
    }
    EACH_COEFFICIENT(ADD_UP)
}

#define ADD_PART(name) sums->name += part.name;
template <class Pass>
void run(const Settings& settings, const Row* rows, int64_t count, Sums* sums, Pass pass) {
    struct Task { int64_t row, start, end; };
    std::vector<Task> tasks;
    for (int64_t row = 0; row < count; ++row)
        for (int64_t start = 0; start < rows[row].numel; start += TASK)
            tasks.push_back({row, start, std::min(start + TASK, rows[row].numel)});
    const Coefficients q(settings);
    // One sum for each task, added up in order at the end: the result does not depend on the threads.
    std::vector<Sums> partial(tasks.size(), Sums{});
#pragma omp parallel for schedule(dynamic, 1) num_threads(settings.threads)
    for (size_t k = 0; k < tasks.size(); ++k) {
        const Task task = tasks[k];
        const Row row = rows[task.row];
        for (int64_t start = task.start; start < task.end; start += SUMMED)
            pass(q, settings, row, start, std::min(start + SUMMED, task.end), &partial[k]);
    }
    if (sums)
        for (const Sums& part : partial) { EACH_COEFFICIENT(ADD_PART) }
}

}  // namespace

extern "C" {

// The checksum of what is repeated here, see agreement.py and CONTRIBUTING.md.
const char* mada_implements() { return "1b7e6414e1d1fe87"; }

void mada_complete(const Settings* settings, const Row* rows, int64_t count, Sums* sums) {
    run(*settings, rows, count, sums, settings->keep ? complete<true> : complete<false>);
    Coefficients(*settings).scale(*sums);
}

void mada_advance(const Settings* settings, const Row* rows, int64_t count) {
    run(*settings, rows, count, nullptr, advance);
}

void mada_complete_and_step(
    const Settings* pending, const Settings* settings, const Row* rows, int64_t count, Sums* sums) {
    const Coefficients earlier(*pending);
    const auto pass = settings->keep ? complete_and_step<true> : complete_and_step<false>;
    run(*settings, rows, count, sums, [&](const auto&... of_range) { pass(earlier, of_range...); });
    earlier.scale(*sums);
}

void mada_step(const Settings* settings, const Row* rows, int64_t count) {
    const auto keeping = settings->stored ? step<true, true> : step<true, false>;
    run(*settings, rows, count, nullptr, settings->keep ? keeping : step<false, false>);
}

}  // extern "C"
