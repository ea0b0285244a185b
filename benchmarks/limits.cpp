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

// Twelve chains hide the latency of one.
#define CHAINS 12
#define KEEP(x) __asm__ volatile("" : "+v"(x))

int main(int count, char** words) {
  const int threads = count > 1 ? std::atoi(words[1]) : 1;
  const size_t bytes = size_t(512) << 20, share = bytes / threads / 1024 * 1024;
  auto* data = static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  madvise(data, bytes, MADV_HUGEPAGE);
  for (size_t i = 0; i < bytes; i += 64) data[i] = char(i);
  const double read = seconds(threads, [&](int rank) {
    const char* p = data + rank * share;
    __m512i sum[8] = {};
    for (size_t i = 0; i < share; i += 512) {
      for (int j = 0; j < 8; ++j) sum[j] = _mm512_xor_si512(sum[j], _mm512_load_si512(p + i + 64 * j));
      _mm_prefetch(p + i + 4096, _MM_HINT_T0);
    }
    for (auto& each : sum) KEEP(each);
  });
  const long rounds = 10'000'000;
  const double float32 = seconds(threads, [&](int) {
    __m512 chain[CHAINS], a = _mm512_set1_ps(0.5f);
    for (auto& each : chain) each = a;
    for (long i = 0; i < rounds; ++i)
      for (auto& each : chain) { each = _mm512_fmadd_ps(each, a, a); KEEP(each); }
  });
  const double bfloat16 = seconds(threads, [&](int) {
    __m512 chain[CHAINS];
    const __m512bh a = (__m512bh)_mm512_setzero_si512();
    for (auto& each : chain) each = _mm512_setzero_ps();
    for (long i = 0; i < rounds; ++i)
      for (auto& each : chain) { each = _mm512_dpbf16_ps(each, a, a); KEEP(each); }
  });
  const double int8 = seconds(threads, [&](int) {
    __m512i chain[CHAINS];
    const __m512i a = _mm512_set1_epi8(1);
    for (auto& each : chain) each = a;
    for (long i = 0; i < rounds; ++i)
      for (auto& each : chain) { each = _mm512_dpbusd_epi32(each, a, a); KEEP(each); }
  });
  const double calls = double(rounds) * CHAINS * threads / 1e9;
  std::printf("{\"threads\": %d, \"bandwidth_gb_s\": %.1f, \"float32_gmac_s\": %.0f, \"bfloat16_gmac_s\": %.0f, "
              "\"int8_gmac_s\": %.0f}\n",
              threads, double(share) * threads / read / 1e9, calls * 16 / float32, calls * 32 / bfloat16,
              calls * 64 / int8);
}
