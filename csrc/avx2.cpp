#include "kernels.h"
#include "parallel.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && !defined(__clang__)  // clang has no such pragma: it runs the portable set
#pragma GCC target("avx2,fma")
#include <immintrin.h>
#define MOEFORGE_AVX2 1
#define MOEFORGE_SET avx2
#include "kernels.inc"
#else
const moeforge::Kernels* moeforge::avx2_kernels() { return nullptr; }
#endif
