// Distributes rows over threads, a few at a time, so that masked rows do not unbalance the load.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace repo {

constexpr int64_t kElementsPerThread = 1 << 17;  // fewer are done before another thread is awake
constexpr int64_t kElementsPerTurn = 1 << 18;  // a row fetches the beginning of the next one
constexpr int64_t kTurnsPerThread = 8;         // at least, if there are so many rows

// Calls work(context) on up to `threads` threads at once, this one included, and returns when all are done.
void on_threads(int threads, void (*work)(void*), void* context);

// Calls body(first, last) for consecutive ranges of [0, rows), and finish() at the end of each thread. Neither may
// throw. busy_elements: elements to work on in all, which bounds the number of threads.
template <class Body, class Finish>
void parallel_rows(int64_t rows, int64_t columns, int64_t busy_elements, int threads, Body body, Finish finish) {
    struct Job {
        int64_t rows, turn;
        Body& body;
        Finish& finish;
        std::atomic<int64_t> next{0};

        static void run(void* self) {
            Job& job = *static_cast<Job*>(self);
            for (int64_t first; (first = job.next.fetch_add(job.turn)) < job.rows;)
                job.body(first, std::min(first + job.turn, job.rows));
            job.finish();
        }
    };
    const int64_t most = rows / (std::max(threads, 1) * kTurnsPerThread);
    const int64_t turn = std::max<int64_t>(1, std::min(most, kElementsPerTurn / std::max<int64_t>(columns, 1)));
    const int64_t useful = std::min({int64_t(threads), busy_elements / kElementsPerThread, (rows + turn - 1) / turn});
    Job job = {rows, turn, body, finish};
    on_threads(int(std::max<int64_t>(useful, 1)), Job::run, &job);
}

}  // namespace repo
