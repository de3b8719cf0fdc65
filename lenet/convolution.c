// LeNet's two convolutional layers, forward and backward, for LANES images at a time: one in each lane of a vector.
//
// With the image innermost, every operation is the same for all lanes, so that no shuffling is needed, and a convolution
// can do exactly the multiplications it consists of. Sums stay in registers, a tile of them at a time: as many as the
// registers hold, beside factors, of which AVX2 has 16 of 8 lanes and AVX-512 32 of 16. fused.py has the layers' order
// and the rest of the network.

#include <stdint.h>
#include <string.h>

#ifndef LANES
#define LANES 8  // or 16, for AVX-512
#endif
#define TALL (LANES / 2)  // channels in a tile of the second convolution: the first has 6
#define FILTER 5
#define IMAGE 32
#define SIDE1 28
#define SIDE2 14
#define SIDE3 10
#define SIDE4 5
#define CHANNELS1 6
#define CHANNELS2 16
#define FEATURES (CHANNELS2 * SIDE4 * SIDE4)
#define PADDED (SIDE3 + 2)

#if defined __x86_64__ && LANES == 16
#define FOR_PROCESSOR __attribute__((target("avx512f,fma")))
#elif defined __x86_64__
#define FOR_PROCESSOR __attribute__((target("avx2,fma")))
#else
#define FOR_PROCESSOR
#endif
#define INLINE FOR_PROCESSOR static inline __attribute__((always_inline))
#define EACH(i, n) for (int i = 0; i < (n); i++)
#define UNROLLED _Pragma("GCC unroll 16")

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));  // -1 where a comparison holds, else 0

enum { SIGMOID, TANH, RELU };

// What the backward pass needs of the forward pass.
typedef struct {
    Vec image[IMAGE * IMAGE];
    Vec active1[CHANNELS1 * SIDE1 * SIDE1], pooled1[CHANNELS1 * SIDE2 * SIDE2];
    Vec active2[CHANNELS2 * SIDE3 * SIDE3], pooled2[FEATURES];
} Kept;

INLINE Vec choose(Ints where, Vec a, Vec b) { return (Vec)((where & (Ints)a) | (~where & (Ints)b)); }
INLINE Vec all(float x) { return (Vec){} + x; }

// To 3 units in the last place, and NaN for NaN.
INLINE Vec sigmoid(Vec x) {
    x = choose(x > 87, all(-87), choose(x < -87, all(87), -x));
    // exp(x) is 2^whole exp(rest). Adding 1.5 * 2^23 rounds to a whole number, which is then in the low bits.
    Vec whole = x * 1.44269504f + 12582912.0f;
    Vec power = (Vec)(((Ints)whole - 0x4b400000 + 127) << 23);
    whole -= 12582912.0f;
    Vec rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;  // ln 2, in two parts
    Vec sum = rest * (1.0f / 5040) + 1.0f / 720;
    sum = sum * rest + 1.0f / 120;
    sum = sum * rest + 1.0f / 24;
    sum = sum * rest + 1.0f / 6;
    sum = sum * rest + 0.5f;
    sum = sum * rest + 1;
    sum = sum * rest + 1;
    return 1 / (1 + sum * power);
}

INLINE Vec activated(Vec x, int activation) {
    if (activation == SIGMOID) return sigmoid(x);
    if (activation == TANH) return 2 * sigmoid(2 * x) - 1;
    return choose(x <= 0, all(0), x);
}

INLINE Vec slope(Vec y, int activation) {
    if (activation == SIGMOID) return y * (1 - y);
    if (activation == TANH) return 1 - y * y;
    return choose(y > 0, all(1), all(0));
}

// x (channels, side, side) to y (outs, side - 4, side - 4), by tiles of `tall` channels and two pixels.
INLINE void convolve(const Vec *x, int channels, int side, const float *weight, const float *bias, Vec *y, int outs,
                     int tall) {
    const int to = side - FILTER + 1, next = channels * FILTER * FILTER;
    for (int out = 0; out < outs; out += tall)
        EACH(row, to) for (int col = 0; col < to; col += 2) {
            Vec sum[8][2];
            UNROLLED EACH(t, tall) UNROLLED EACH(p, 2) sum[t][p] = all(bias[out + t]);
            EACH(c, channels) EACH(i, FILTER) {
                const Vec *from = x + (c * side + row + i) * side + col;
                const float *by = weight + out * next + (c * FILTER + i) * FILTER;
                UNROLLED EACH(j, FILTER) UNROLLED EACH(t, tall) UNROLLED EACH(p, 2)
                    sum[t][p] += by[t * next + j] * from[j + p];
            }
            UNROLLED EACH(t, tall) UNROLLED EACH(p, 2) y[((out + t) * to + row) * to + col + p] = sum[t][p];
        }
}

// NaN if one of them is.
INLINE Vec larger(Vec a, Vec b) { return choose((a > b) | (a != a), a, b); }

// Activation of y (channels, side, side) and pooling by two. y is activated in place, but for the largest of four, which
// is taken before: a fourth of the work, and the same number as activations only rise.
INLINE void pool(Vec *y, int channels, int side, Vec *pooled, int activation, int largest) {
    EACH(row, channels * side / 2) EACH(col, side / 2) {
        Vec *above = y + 2 * row * side + 2 * col, *below = above + side;
        if (largest)
            *pooled++ = activated(larger(larger(above[0], above[1]), larger(below[0], below[1])), activation);
        else {
            EACH(p, 2) above[p] = activated(above[p], activation), below[p] = activated(below[p], activation);
            *pooled++ = (above[0] + above[1] + below[0] + below[1]) * 0.25f;
        }
    }
}

// From the gradient of `pooled` to that before the activation, whose rows are `stride` apart.
INLINE void unpool(const Vec *y, int channels, int side, const Vec *pooled, const Vec *gradient, Vec *to, int stride,
                   int activation, int largest) {
    EACH(row, channels * side / 2) EACH(col, side / 2) {
        const Vec *above = y + 2 * row * side + 2 * col, *below = above + side;
        Vec *to_above = to + 2 * row * stride + 2 * col, *to_below = to_above + stride;
        Vec a = above[0], b = above[1], c = below[0], d = below[1], g = *gradient++;
        if (largest) {  // Where several are the largest, as on a black background, they share.
            const Vec peak = larger(larger(a, b), larger(c, d)), one = all(1), none = all(0);
            a = choose(a == peak, one, none), b = choose(b == peak, one, none);
            c = choose(c == peak, one, none), d = choose(d == peak, one, none);
            g *= slope(*pooled++, activation) / (a + b + c + d);
        } else {
            g *= 0.25f;
            a = slope(a, activation), b = slope(b, activation), c = slope(c, activation), d = slope(d, activation);
        }
        to_above[0] = g * a, to_above[1] = g * b, to_below[0] = g * c, to_below[1] = g * d;
    }
}

// Adds what x (channels, side, side) and the gradient d (outs, side - 4, side - 4) give for weights and biases, lane
// by lane.
INLINE void weigh(const Vec *x, int channels, int side, const Vec *d, int stride, Vec *weight, Vec *bias, int outs) {
    const int to = side - FILTER + 1, next = channels * FILTER * FILTER;
    for (int out = 0; out < outs; out += 2) EACH(c, channels) EACH(i, FILTER) {
        Vec sum[2][FILTER], *total = weight + out * next + (c * FILTER + i) * FILTER;
        UNROLLED EACH(t, 2) UNROLLED EACH(j, FILTER) sum[t][j] = total[t * next + j];
        EACH(row, to) {
            const Vec *from = x + (c * side + row + i) * side, *by = d + (out * to + row) * stride;
            EACH(col, to) UNROLLED EACH(t, 2) UNROLLED EACH(j, FILTER)
                sum[t][j] += by[t * to * stride + col] * from[col + j];
        }
        UNROLLED EACH(t, 2) UNROLLED EACH(j, FILTER) total[t * next + j] = sum[t][j];
    }
    EACH(out, outs) EACH(row, to) EACH(col, to) bias[out] += d[(out * to + row) * stride + col];
}

// The gradient of x (6, 14, 14) from d (16, 10, 10), whose rows have a zero on either side; weights are (5, 5, 16, 6).
INLINE void back(const Vec *d, const float *weight, Vec *x) {
    EACH(row, SIDE2) for (int col = 0; col < SIDE2; col += 2) {
        Vec sum[CHANNELS1][2];
        UNROLLED EACH(t, CHANNELS1) sum[t][0] = sum[t][1] = all(0);
        const int top = row < SIDE3 ? 0 : row - SIDE3 + 1, low = row < FILTER ? row : FILTER - 1;
        const int left = col < SIDE3 ? 0 : col - SIDE3 + 1, right = col < FILTER - 1 ? col + 1 : FILTER - 1;
        for (int i = top; i <= low; i++) for (int j = left; j <= right; j++) {
            const Vec *from = d + (row - i) * PADDED + col - j;
            const float *by = weight + (i * FILTER + j) * CHANNELS2 * CHANNELS1;
            EACH(out, CHANNELS2) UNROLLED EACH(t, CHANNELS1) UNROLLED EACH(p, 2)
                sum[t][p] += by[out * CHANNELS1 + t] * from[out * SIDE3 * PADDED + p];
        }
        UNROLLED EACH(t, CHANNELS1) UNROLLED EACH(p, 2) x[(t * SIDE2 + row) * SIDE2 + col + p] = sum[t][p];
    }
}

FOR_PROCESSOR static void add_lanes(const Vec *from, float *to, int count) {
    EACH(k, count) {
        float sum = 0;
        EACH(lane, LANES) sum += from[k][lane];
        to[k] = sum;
    }
}

// Bytes to keep of so many images, to be aligned as vectors are.
size_t room(int count) { return sizeof(Kept) * ((count + LANES - 1) / LANES); }

// Pixels (count, side, side), which count as p * scale - shift and on the border as 0 does, to features (400, count).
FOR_PROCESSOR void forward(const uint8_t *pixels, int count, int side, float scale, float shift, const float *weight1,
                           const float *bias1, const float *weight2, const float *bias2, int activation, int largest,
                           Kept *kept, float *features) {
    const int edge = (IMAGE - side) / 2;
    for (int start = 0; start < count; start += LANES, kept++) {
        const int here = count - start < LANES ? count - start : LANES;  // the other lanes are black
        EACH(k, IMAGE * IMAGE) kept->image[k] = all(-shift);
        EACH(lane, here) EACH(row, side) EACH(col, side)
            kept->image[(edge + row) * IMAGE + edge + col][lane] = *pixels++ * scale - shift;
        convolve(kept->image, 1, IMAGE, weight1, bias1, kept->active1, CHANNELS1, 6);
        pool(kept->active1, CHANNELS1, SIDE1, kept->pooled1, activation, largest);
        convolve(kept->pooled1, CHANNELS1, SIDE2, weight2, bias2, kept->active2, CHANNELS2, TALL);
        pool(kept->active2, CHANNELS2, SIDE3, kept->pooled2, activation, largest);
        EACH(k, FEATURES) EACH(lane, here) features[k * count + start + lane] = kept->pooled2[k][lane];
    }
}

// From the features' gradient (400, count) and what was kept, which is used up, to those of the parameters.
// `turned` is weight2 as (5, 5, 16, 6).
FOR_PROCESSOR void backward(const float *gradient, int count, const float *turned, int activation, int largest, Kept *kept,
                            float *weight1, float *bias1, float *weight2, float *bias2) {
    enum { WEIGHTS1 = CHANNELS1 * FILTER * FILTER, WEIGHTS2 = CHANNELS2 * CHANNELS1 * FILTER * FILTER };
    Vec pooled2[FEATURES], padded[1 + CHANNELS2 * SIDE3 * PADDED], pooled1[CHANNELS1 * SIDE2 * SIDE2];
    Vec sum1[WEIGHTS1] = {}, sum_bias1[CHANNELS1] = {}, sum2[WEIGHTS2] = {}, sum_bias2[CHANNELS2] = {};
    memset(padded, 0, sizeof padded);
    for (int start = 0; start < count; start += LANES, kept++) {
        EACH(k, FEATURES) EACH(lane, LANES)
            pooled2[k][lane] = start + lane < count ? gradient[k * count + start + lane] : 0;
        unpool(kept->active2, CHANNELS2, SIDE3, kept->pooled2, pooled2, padded + 1, PADDED, activation, largest);
        weigh(kept->pooled1, CHANNELS1, SIDE2, padded + 1, PADDED, sum2, sum_bias2, CHANNELS2);
        back(padded + 1, turned, pooled1);
        unpool(kept->active1, CHANNELS1, SIDE1, kept->pooled1, pooled1, kept->active1, SIDE1, activation, largest);
        weigh(kept->image, 1, IMAGE, kept->active1, SIDE1, sum1, sum_bias1, CHANNELS1);
    }
    add_lanes(sum1, weight1, WEIGHTS1), add_lanes(sum_bias1, bias1, CHANNELS1);
    add_lanes(sum2, weight2, WEIGHTS2), add_lanes(sum_bias2, bias2, CHANNELS2);
}
