// Threads are those of the OpenMP library that torch has loaded already: a second pool would fight with it for the cores.
#pragma once

#include <algorithm>
#include <cstdint>

namespace moeforge {

// Runs body(context, thread, threads) on so many threads at most; waits for all.
void parallel(int threads, void (*body)(void*, int, int), void* context);
// Waits until all threads of the innermost `parallel` are here.
void barrier();

template <class Body>
void parallel(int threads, Body body) {
    parallel(threads, [](void* context, int thread, int count) { (*static_cast<Body*>(context))(thread, count); }, &body);
}

struct Share {
    int64_t begin, end;
};

// The part of `count` things that falls to a thread.
inline Share share(int64_t count, int thread, int threads) {
    return {count * thread / threads, count * (thread + 1) / threads};
}

// Threads worth waking for this much work, about a microsecond of it each.
inline int worth(int64_t work, int64_t unit, int threads) {
    return static_cast<int>(std::min<int64_t>(threads, 1 + work / unit));
}

}  // namespace moeforge
