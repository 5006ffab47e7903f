// The library's functions, all in C's calling convention, called through ctypes (src/moeforge/kernels/native.py).
#include <algorithm>
#include <cstring>
#include <memory>

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

// Rows of `bytes` to the pages' rows `slots`.
void write(const void* keys, const void* values, const int64_t* slots, int64_t rows, int64_t bytes, void* key_pages,
           void* value_pages) {
    for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(static_cast<char*>(key_pages) + slots[r] * bytes, static_cast<const char*>(keys) + r * bytes, bytes);
        std::memcpy(static_cast<char*>(value_pages) + slots[r] * bytes, static_cast<const char*>(values) + r * bytes, bytes);
    }
}

template <class Item>
std::unique_ptr<Item[]> room(int64_t count) {
    return std::unique_ptr<Item[]>(new Item[static_cast<size_t>(count)]);
}

// x [T, D] through the layers, in place: what the functions below do one by one, in the same order and rounded alike.
void decode(const Layer* layers, int64_t count, const Step& step, float eps, bf16* x, int threads) {
    const Kernels& k = *chosen;
    const int64_t tokens = step.tokens, hidden = layers->qkv->inputs;
    int64_t widest = 0, top_k = 0;
    for (const Layer* layer = layers; layer < layers + count; ++layer) {
        widest = std::max({widest, layer->qkv->outputs, layer->gate ? 0 : layer->w13->outputs});
        top_k = std::max(top_k, layer->gate ? layer->gate->top_k : 0);
    }
    // What one layer leaves here the next one overwrites.
    const auto u = room<bf16>(tokens * hidden), y = room<bf16>(tokens * hidden), wide = room<bf16>(tokens * widest),
               parts = room<bf16>(tokens * widest), attended = room<bf16>(tokens * widest);
    const auto weights = room<float>(tokens * top_k);
    const auto experts = room<int64_t>(tokens * top_k);
    for (const Layer* layer = layers; layer < layers + count; ++layer) {
        Attention a = layer->attention;
        a.table_width = step.table_width;
        const int64_t heads = a.groups * a.heads_per_group * a.head_dim, kv = a.groups * a.head_dim;
        bf16 *q = parts.get(), *key = q + tokens * heads, *value = key + tokens * kv;
        k.rms_norm(x, layer->attention_norm, tokens, hidden, eps, u.get(), threads);
        k.linear(*layer->qkv, u.get(), tokens, layer->qkv_bias, wide.get(), threads);
        k.split_qkv(wide.get(), step.cos, step.sin, tokens, a.groups, a.heads_per_group, a.head_dim, q, key, value, threads);
        write(key, value, step.slots, tokens, kv * static_cast<int64_t>(sizeof(bf16)), const_cast<void*>(a.keys),
              const_cast<void*>(a.values));
        k.attend(a, q, step.table, step.lengths, tokens, attended.get(), threads);
        k.linear(*layer->o, attended.get(), tokens, nullptr, y.get(), threads);
        k.add(y.get(), x, tokens * hidden, threads);
        k.rms_norm(x, layer->ffn_norm, tokens, hidden, eps, u.get(), threads);
        if (const Gate* gate = layer->gate) {
            k.choose(*gate, u.get(), tokens, weights.get(), experts.get(), threads);
            k.experts(layer->w13, layer->w2, gate->experts, u.get(), tokens, gate->top_k, experts.get(), weights.get(),
                      y.get(), threads);
        } else {
            k.linear(*layer->w13, u.get(), tokens, nullptr, wide.get(), threads);
            k.swiglu(wide.get(), tokens, layer->w2->inputs, parts.get(), threads);
            k.linear(*layer->w2, parts.get(), tokens, nullptr, y.get(), threads);
        }
        k.add(y.get(), x, tokens * hidden, threads);
    }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Counts changes of what is called and how: the caller must be of the same build.
EXPORT int moeforge_abi() { return 2; }

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

EXPORT void moeforge_write(const void* keys, const void* values, const int64_t* slots, int64_t rows, int64_t bytes,
                           void* key_pages, void* value_pages) {
    write(keys, values, slots, rows, bytes, key_pages, value_pages);
}

EXPORT void moeforge_attend(const Attention* attention, const bf16* q, const int64_t* table, const int64_t* lengths,
                            int64_t sequences, bf16* out, int threads) {
    chosen->attend(*attention, q, table, lengths, sequences, out, threads);
}

// One new token of each sequence through all layers: x [T, D] is replaced.
EXPORT void moeforge_decode(const Layer* layers, int64_t count, const Step* step, float eps, bf16* x, int threads) {
    decode(layers, count, *step, eps, x, threads);
}
