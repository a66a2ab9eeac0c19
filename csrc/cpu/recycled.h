// Memory for results too large for malloc to keep: it maps them anew each time, and the system clears every page first, which
// takes as long as the kernel that fills them. The last block handed back is kept and given to the next result of its size.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

#include "simd.h"

namespace dinofast {

class Recycled {
  public:
    static void* take(size_t bytes) {
        const std::lock_guard<std::mutex> lock(mutex());
        if (spare().second == bytes) return std::exchange(spare(), {nullptr, 0}).first;
        std::free(std::exchange(spare(), {nullptr, 0}).first);
        constexpr size_t page = 1 << 21;
        void* data = std::aligned_alloc(page, (bytes + page - 1) / page * page);
        if (!data) throw std::bad_alloc();
        huge_pages(data, bytes);
        return data;
    }

    static void give_back(void* data, size_t bytes) {
        const std::lock_guard<std::mutex> lock(mutex());
        std::free(std::exchange(spare(), {data, bytes}).first);
    }

  private:
    static std::mutex& mutex() {
        static std::mutex one;
        return one;
    }
    static std::pair<void*, size_t>& spare() {
        static std::pair<void*, size_t> one{nullptr, 0};
        return one;
    }
};

}  // namespace dinofast
