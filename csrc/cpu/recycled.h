// Memory for results too large for malloc to keep: it maps them anew each time, and the system clears every page first. The last
// blocks handed back are kept and given to the next results of their size: 21 ms a call of the loss with 32 images instead of 84
// (benchmarks/paths.py, one thread of an AMD EPYC, 2026-11-27). runtime/memory.py has the same cure for all of a training run; a
// script that only takes our loss has no other.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <iterator>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "simd.h"

namespace dinofast {

class Recycled {
  public:
    static void* take(size_t bytes) {
        const std::lock_guard<std::mutex> lock(mutex());
        for (auto spare = spares().rbegin(); spare != spares().rend(); ++spare)
            if (spare->second == bytes) {
                void* data = spare->first;
                spares().erase(std::next(spare).base());
                return data;
            }
        constexpr size_t page = 1 << 21;
        void* data = std::aligned_alloc(page, (bytes + page - 1) / page * page);
        if (!data) throw std::bad_alloc();
        huge_pages(data, bytes);
        return data;
    }

    static void give_back(void* data, size_t bytes) {
        const std::lock_guard<std::mutex> lock(mutex());
        spares().emplace_back(data, bytes);
        if (spares().size() > kSpares) std::free(spares().front().first), spares().erase(spares().begin());
    }

  private:
    static std::mutex& mutex() {
        static std::mutex one;
        return one;
    }
    static std::vector<std::pair<void*, size_t>>& spares() {
        static std::vector<std::pair<void*, size_t>> all;
        return all;
    }
    static constexpr size_t kSpares = 4;  // the loss's gradient, and crops of two resolutions
};

}  // namespace dinofast
