// A team of threads that computes one step together: they meet at the end of each phase, and share its tasks as they come.
//
// The thread that asks for a step is one of the team. Between steps the others sleep, after a moment of waiting awake; while a
// step runs nobody sleeps, but whoever waits long gives its processor to others.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <sched.h>
#include <thread>
#include <vector>

#include <immintrin.h>

namespace {

class Team {
public:
    explicit Team(int64_t size) : size_(size) {
        for (int64_t i = 1; i < size; ++i) threads_.emplace_back([this, i] { serve(i); });
    }

    ~Team() {
        {
            std::lock_guard lock(mutex_);
            is_ending_ = true;
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
    }

    int64_t size() const { return size_; }

    // `job(member)` on every thread, this one included; returns when all have ended. One caller at a time.
    void run(const std::function<void(int64_t)>& job) {
        if (size_ > 1) {
            {
                std::lock_guard lock(mutex_);
                job_ = &job;
                step_.fetch_add(1, std::memory_order_release);
            }
            wake_.notify_all();
        }
        job(0);
        meet();
    }

    // Called by every thread of the job with the same arguments: task(i, next) for each i below `count`, each on one of them; `next` is the
    // one that this thread will do afterwards, or i itself. All have ended when it returns.
    template <class Task> void share(int64_t count, Task task) {
        auto at = claim();
        while (at < count) {
            const int64_t next = claim();
            task(at, next < count ? next : at);
            at = next;
        }
        meet();
    }

    void meet() {
        if (size_ == 1) {
            next_ = 0;
            return;
        }
        const int64_t meeting = meeting_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            next_.store(0, std::memory_order_relaxed);
            meeting_.store(meeting + 1, std::memory_order_release);
            return;
        }
        for (int64_t turn = 0; meeting_.load(std::memory_order_acquire) == meeting; ++turn) {
            if (turn < SPINS) _mm_pause(); else sched_yield();
        }
    }

private:
    static constexpr int64_t SPINS = 2000;  // about 50 us

    int64_t claim() { return next_.fetch_add(1, std::memory_order_relaxed); }

    void serve(int64_t member) {
        for (int64_t done = 0;; ++done) {
            for (int64_t turn = 0; turn < SPINS && step_.load(std::memory_order_acquire) == done; ++turn) _mm_pause();
            {
                std::unique_lock lock(mutex_);
                wake_.wait(lock, [&] { return is_ending_ || step_.load(std::memory_order_acquire) != done; });
                if (is_ending_) return;
            }
            (*job_)(member);
            meet();
        }
    }

    const int64_t size_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_;
    bool is_ending_ = false;
    const std::function<void(int64_t)>* job_ = nullptr;
    alignas(64) std::atomic<int64_t> step_{0};
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int64_t> arrived_{0};
    alignas(64) std::atomic<int64_t> meeting_{0};
};

}  // namespace
