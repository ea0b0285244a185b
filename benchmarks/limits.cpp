// What the machine can do at most: bytes read from memory and multiply-adds, per second, with a number of threads.
// It knows nothing of models. Prints one JSON object. Usage: limits THREADS
#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

static double seconds(int threads, const std::function<void(int)>& work) {
  double best = 1e9;
  for (int repeat = 0; repeat < 7; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> team;
    for (int rank = 0; rank < threads; ++rank) team.emplace_back(work, rank);
    for (auto& member : team) member.join();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

// Chains of one instruction hide its latency; in registers by name, since compilers like to keep arrays in memory.
#define FOUR(i, a, b, c, d) i(a) i(b) i(c) i(d)
#define TWELVE(i) FOUR(i, 0, 1, 2, 3) FOUR(i, 4, 5, 6, 7) FOUR(i, 8, 9, 10, 11)
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
using Vector = __m512i;
constexpr int CHAINS = 16, BFLOAT16 = 2, INT8 = 4;  // multiply-adds per 32 bits
#define ALL(i) TWELVE(i) FOUR(i, 12, 13, 14, 15)
#define TIMES_FLOAT32(n) "vfmadd231ps %%zmm30, %%zmm30, %%zmm" #n "\n"
#define TIMES_BFLOAT16(n) "vdpbf16ps %%zmm30, %%zmm30, %%zmm" #n "\n"
#define TIMES_INT8(n) "vpdpbusd %%zmm30, %%zmm30, %%zmm" #n "\n"
#define ZEROS "vpxord %%zmm30, %%zmm30, %%zmm30"
#define MORE , "xmm30"
inline Vector both(Vector a, const char* p) { return _mm512_xor_si512(a, _mm512_load_si512(p)); }
#else
using Vector = __m256i;
constexpr int CHAINS = 12, BFLOAT16 = 1, INT8 = 4;
#define ALL(i) TWELVE(i)
#define TIMES_FLOAT32(n) "vfmadd231ps %%ymm14, %%ymm14, %%ymm" #n "\n"
#define TIMES_BFLOAT16(n) TIMES_FLOAT32(n)
#define TIMES_INT8(n) "vpmaddubsw %%ymm14, %%ymm14, %%ymm15\n vpaddw %%ymm15, %%ymm" #n ", %%ymm" #n "\n"
#define ZEROS "vpxor %%ymm14, %%ymm14, %%ymm14"
#define MORE
inline Vector both(Vector a, const char* p) {
  return _mm256_xor_si256(a, _mm256_load_si256(reinterpret_cast<const Vector*>(p)));
}
#endif
constexpr int BYTES = sizeof(Vector);
#define RUN(i)                                                                                                   \
  __asm__ volatile(ZEROS ::: "xmm14", "xmm15" MORE);                                                             \
  for (long round = 0; round < rounds; ++round)                                                                  \
    __asm__ volatile(ALL(i) ::: "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",  \
                     "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15" MORE)

int main(int count, char** words) {
  const int threads = count > 1 ? std::atoi(words[1]) : 1;
  const size_t bytes = size_t(512) << 20, share = bytes / threads / 1024 * 1024;
  auto* data = static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  madvise(data, bytes, MADV_HUGEPAGE);
  for (size_t i = 0; i < bytes; i += 64) data[i] = char(i);
  const double read = seconds(threads, [&](int rank) {
    const char* p = data + rank * share;
    Vector sum[8] = {};
    for (size_t i = 0; i < share; i += 8 * BYTES) {
      for (int j = 0; j < 8; ++j) sum[j] = both(sum[j], p + i + BYTES * j);
      _mm_prefetch(p + i + 4096, _MM_HINT_T0);
    }
    for (auto& each : sum) __asm__ volatile("" : "+v"(each));
  });
  const long rounds = 10'000'000;
  const double float32 = seconds(threads, [&](int) { RUN(TIMES_FLOAT32); });
  const double bfloat16 = seconds(threads, [&](int) { RUN(TIMES_BFLOAT16); });
  const double int8 = seconds(threads, [&](int) { RUN(TIMES_INT8); });
  const double sums = double(rounds) * CHAINS * (BYTES / 4) * threads / 1e9;
  std::printf("{\"threads\": %d, \"bandwidth_gb_s\": %.1f, \"float32_gmac_s\": %.0f, \"bfloat16_gmac_s\": %.0f, "
              "\"int8_gmac_s\": %.0f}\n",
              threads, double(share) * threads / read / 1e9, sums / float32, BFLOAT16 * sums / bfloat16,
              INT8 * sums / int8);
}
