#include "parallel.h"

#include <dlfcn.h>

namespace moeforge {
namespace {

struct OpenMP {
    void (*run)(void (*)(void*), void*, unsigned, unsigned);
    void (*barrier)();
    int (*thread)();
    int (*threads)();

    // libgomp's names; LLVM's and Intel's libraries have them too.
    OpenMP()
        : run(find<decltype(run)>("GOMP_parallel")),
          barrier(find<decltype(barrier)>("GOMP_barrier")),
          thread(find<decltype(thread)>("omp_get_thread_num")),
          threads(find<decltype(threads)>("omp_get_num_threads")) {}

    bool found() const { return run && barrier && thread && threads; }

    template <class Function>
    static Function find(const char* name) {
        return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
    }
};

const OpenMP& openmp() {
    static const OpenMP library;
    return library;
}

struct Task {
    void (*body)(void*, int, int);
    void* context;
};

}  // namespace

void parallel(int threads, void (*body)(void*, int, int), void* context) {
    if (threads <= 1 || !openmp().found()) {
        body(context, 0, 1);
        return;
    }
    Task task{body, context};
    openmp().run(
        [](void* data) {
            const Task& t = *static_cast<Task*>(data);
            t.body(t.context, openmp().thread(), openmp().threads());
        },
        &task, static_cast<unsigned>(threads), 0);
}

void barrier() {
    // Outside of `run` (one thread) libgomp's barrier returns at once.
    if (openmp().found()) openmp().barrier();
}

}  // namespace moeforge
