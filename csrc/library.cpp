// The library's functions, all in C's calling convention, called through ctypes (src/moeforge/kernels/native.py).
#include <cstring>

#include "kernels.h"
#include "parallel.h"

using namespace moeforge;

namespace {

const Kernels* best() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (avx512_kernels() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return avx512_kernels();
    if (avx2_kernels() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2_kernels();
#endif
    return portable_kernels();
}

const Kernels* chosen = best();

// [outputs, inputs] of items to pairs of panels with `together` neighbouring inputs of an output side by side. `gated`: a
// pair is a panel of the first half of the outputs and the same of the second; otherwise neighbours.
template <class Item>
void pack(const Item* from, int64_t outputs, int64_t inputs, int64_t together, bool gated, Item* to, int threads) {
    const int64_t pairs = (outputs + 2 * kPanel - 1) / (2 * kPanel);
    parallel(threads, [&](int thread, int all) {
        const Share mine = share(pairs, thread, all);
        for (int64_t pair = mine.begin; pair < mine.end; ++pair) {
            for (int64_t o = 0; o < 2 * kPanel; ++o) {
                const int64_t panel = o / kPanel, row = o % kPanel;
                const int64_t output = gated ? panel * outputs / 2 + pair * kPanel + row : pair * 2 * kPanel + o;
                Item* place = to + pair * inputs * 2 * kPanel + o * together;
                for (int64_t i = 0; i < inputs; i += together)
                    for (int64_t j = 0; j < together; ++j)
                        place[i * 2 * kPanel + j] = output < outputs ? from[output * inputs + i + j] : 0;
            }
        }
    });
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Counts changes of what is called and how: the caller must be of the same build.
EXPORT int moeforge_abi() { return 1; }

// The name of the instruction set in use.
EXPORT const char* moeforge_name() { return chosen->name; }

// Use another one, which this processor must have; false if this build has none of that name. For tests.
EXPORT int moeforge_use(const char* name) {
    for (const Kernels* kernels : {portable_kernels(), avx2_kernels(), best()}) {
        if (kernels && !std::strcmp(kernels->name, name)) {
            chosen = kernels;
            return 1;
        }
    }
    return 0;
}

EXPORT void moeforge_pack_bf16(const bf16* from, int64_t outputs, int64_t inputs, int gated, bf16* to,
                               int threads) {
    pack(from, outputs, inputs, 2, gated, to, threads);
}

EXPORT void moeforge_pack_e4m3(const uint8_t* from, int64_t outputs, int64_t inputs, int gated, uint8_t* to,
                               int threads) {
    pack(from, outputs, inputs, 4, gated, to, threads);
}

EXPORT void moeforge_linear(const Weight* weight, const bf16* x, int64_t rows, const bf16* bias, bf16* out,
                            int threads) {
    chosen->linear(*weight, x, rows, bias, out, threads);
}

EXPORT void moeforge_experts(const Weight* w13, const Weight* w2, int64_t experts, const bf16* x, int64_t tokens,
                             int64_t top_k, const int64_t* assigned, const float* weights, bf16* out, int threads) {
    chosen->experts(w13, w2, experts, x, tokens, top_k, assigned, weights, out, threads);
}

EXPORT void moeforge_choose(const Gate* gate, const bf16* x, int64_t tokens, float* weights, int64_t* assigned,
                            int threads) {
    chosen->choose(*gate, x, tokens, weights, assigned, threads);
}

EXPORT void moeforge_rms_norm(const bf16* x, const bf16* weight, int64_t rows, int64_t width, float eps, bf16* out,
                              int threads) {
    chosen->rms_norm(x, weight, rows, width, eps, out, threads);
}

EXPORT void moeforge_swiglu(const bf16* h, int64_t rows, int64_t width, bf16* out, int threads) {
    chosen->swiglu(h, rows, width, out, threads);
}

EXPORT void moeforge_swiglu_backward(const bf16* h, const bf16* grad, int64_t rows, int64_t width, bf16* out,
                                     bf16* grad_h, int threads) {
    chosen->swiglu_backward(h, grad, rows, width, out, grad_h, threads);
}

EXPORT void moeforge_split_qkv(const bf16* qkv, const bf16* cos, const bf16* sin, int64_t tokens, int64_t groups,
                               int64_t heads_per_group, int64_t head_dim, bf16* q, bf16* k, bf16* v, int threads) {
    chosen->split_qkv(qkv, cos, sin, tokens, groups, heads_per_group, head_dim, q, k, v, threads);
}

// Rows of `bytes` to the pages' rows `slots`.
EXPORT void moeforge_write(const char* keys, const char* values, const int64_t* slots, int64_t rows, int64_t bytes,
                           char* key_pages, char* value_pages) {
    for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(key_pages + slots[r] * bytes, keys + r * bytes, static_cast<size_t>(bytes));
        std::memcpy(value_pages + slots[r] * bytes, values + r * bytes, static_cast<size_t>(bytes));
    }
}

EXPORT void moeforge_attend(const Attention* attention, const bf16* q, const int64_t* table, const int64_t* lengths,
                            int64_t sequences, bf16* out, int threads) {
    chosen->attend(*attention, q, table, lengths, sequences, out, threads);
}
