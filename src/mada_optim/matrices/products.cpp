// Products of float32 matrices, many of one shape at a time: out = alpha a b + beta added + diagonal I.
//
// Where the result is known to be symmetric, one triangle of tiles is computed and mirrored. A tile of ROWS x COLUMNS
// stays in registers while rows and columns of the operands, packed into panels, run past.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512F__)
#define BYTES 64
constexpr int64_t ROWS = 14;
#elif defined(__AVX__)
#define BYTES 32
constexpr int64_t ROWS = 6;
#else
#define BYTES 16
constexpr int64_t ROWS = 8;
#endif
typedef float Vector __attribute__((vector_size(BYTES), aligned(4), may_alias));
constexpr int64_t LANES = BYTES / 4, COLUMNS = 2 * LANES;

struct Operand {
    const float* data;
    int64_t matrix, row, column;         // strides
};

// products.py mirrors it.
struct Product {
    Operand a, b;                        // rows x inner, inner x columns
    const float* added;                  // as out, or null
    float* out;                          // contiguous
    int64_t count, rows, columns, inner;
    float alpha, beta, diagonal;
    int32_t symmetric, threads;
};

#if defined(_OPENMP)
extern "C" int omp_get_thread_num();
#endif

namespace {

int thread() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

int64_t panels(int64_t length, int64_t width) { return (length + width - 1) / width; }

// Panel number `index` of WIDTH rows of a matrix whose elements are `along` apart in a row, and its rows `across`.
template <int64_t WIDTH>
void pack(const float* data, int64_t across, int64_t along, int64_t length, int64_t inner, int64_t index, float* panel) {
    const int64_t first = index * WIDTH, width = std::min(WIDTH, length - first);
    data += first * across;
    if (width == WIDTH && across == 1) {
        for (int64_t k = 0; k < inner; ++k) std::memcpy(panel + k * WIDTH, data + k * along, WIDTH * sizeof(float));
        return;
    }
    if (width < WIDTH) std::memset(panel, 0, WIDTH * inner * sizeof(float));
    constexpr int64_t BLOCK = 16;        // of lines that stay in the cache while they are written
    for (int64_t begin = 0; begin < inner; begin += BLOCK) {
        const int64_t end = std::min(begin + BLOCK, inner);
        for (int64_t i = 0; i < width; ++i)
            for (int64_t k = begin; k < end; ++k) panel[k * WIDTH + i] = data[i * across + k * along];
    }
}

// Rows i and columns j of a product from their panels.
void tile(const Product& of, int64_t matrix, int64_t row, int64_t column, const float* a, const float* b) {
    Vector sums[ROWS][2] = {};
    for (int64_t k = 0; k < of.inner; ++k, a += ROWS, b += COLUMNS) {
        const Vector left = *reinterpret_cast<const Vector*>(b), right = *reinterpret_cast<const Vector*>(b + LANES);
#pragma GCC unroll 16
        for (int64_t i = 0; i < ROWS; ++i) {
            sums[i][0] += a[i] * left;
            sums[i][1] += a[i] * right;
        }
    }
    float values[ROWS][COLUMNS];
    std::memcpy(values, sums, sizeof values);
    const int64_t rows = std::min(ROWS, of.rows - row), columns = std::min(COLUMNS, of.columns - column);
    const int64_t size = of.rows * of.columns;
    float* out = of.out + matrix * size + row * of.columns + column;
    const float* added = of.added ? of.added + (out - of.out) : nullptr;
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) values[i][j] *= of.alpha;
        if (added)
            for (int64_t j = 0; j < columns; ++j) values[i][j] += of.beta * added[i * of.columns + j];
        if (row + i >= column && row + i < column + columns) values[i][row + i - column] += of.diagonal;
        // Elements above the diagonal are those of other tiles, which mirror theirs, maybe in another thread.
        const int64_t width = of.symmetric ? std::clamp<int64_t>(row + i + 1 - column, 0, columns) : columns;
        std::memcpy(out + i * of.columns, values[i], width * sizeof(float));
    }
    if (!of.symmetric) return;
    float* mirrored = of.out + matrix * size + column * of.columns + row;
    for (int64_t j = 0; j < columns; ++j) {
        const int64_t from = std::max<int64_t>(0, column + j + 1 - row);  // below the diagonal alone
        for (int64_t i = from; i < rows; ++i) mirrored[j * of.columns + i] = values[i][j];
    }
}

// All tiles of one panel of columns.
void stripe(const Product& of, int64_t matrix, int64_t index, const float* a, const float* b) {
    const int64_t column = index * COLUMNS;
    const int64_t first = of.symmetric ? column / ROWS : 0;
    for (int64_t i = first; i < panels(of.rows, ROWS); ++i)
        tile(of, matrix, i * ROWS, column, a + i * ROWS * of.inner, b + index * COLUMNS * of.inner);
}

}  // namespace

extern "C" int mada_multiply(const Product* product) {
    const Product& of = *product;
    const int64_t high = panels(of.rows, ROWS), wide = panels(of.columns, COLUMNS);
    const int64_t split = high * ROWS * of.inner;
    const int64_t size = panels(split + wide * COLUMNS * of.inner, 16) * 16;
    const bool apart = of.count >= of.threads;  // each thread takes matrices of its own, or all work on one at a time
    float* const packed = static_cast<float*>(std::aligned_alloc(64, (apart ? of.threads : 1) * size * sizeof(float)));
    if (!packed) return 1;
    const auto pack_panel = [&](int64_t matrix, int64_t index, float* to) {
        const float *a = of.a.data + matrix * of.a.matrix, *b = of.b.data + matrix * of.b.matrix;
        if (index < high)
            pack<ROWS>(a, of.a.row, of.a.column, of.rows, of.inner, index, to + index * ROWS * of.inner);
        else
            pack<COLUMNS>(b, of.b.column, of.b.row, of.columns, of.inner, index - high,
                          to + split + (index - high) * COLUMNS * of.inner);
    };
    if (apart) {
#pragma omp parallel num_threads(of.threads)
        {
            float* own = packed + thread() * size;
#pragma omp for schedule(static)
            for (int64_t matrix = 0; matrix < of.count; ++matrix) {
                for (int64_t index = 0; index < high + wide; ++index) pack_panel(matrix, index, own);
                for (int64_t index = 0; index < wide; ++index) stripe(of, matrix, index, own, own + split);
            }
        }
    } else {
        for (int64_t matrix = 0; matrix < of.count; ++matrix) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(of.threads)
            for (int64_t index = 0; index < high + wide; ++index) pack_panel(matrix, index, packed);
#pragma omp parallel for schedule(dynamic, 1) num_threads(of.threads)
            for (int64_t index = 0; index < wide; ++index) stripe(of, matrix, index, packed, packed + split);
        }
    }
    std::free(packed);
    return 0;
}
