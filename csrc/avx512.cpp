#include "kernels.h"
#include "parallel.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && !defined(__clang__)  // clang has no such pragma: it runs the portable set
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,avx2,fma")
#include <immintrin.h>
#define MOEFORGE_AVX512 1
#define MOEFORGE_SET avx512
#include "kernels.inc"
#else
const moeforge::Kernels* moeforge::avx512_kernels() { return nullptr; }
#endif
