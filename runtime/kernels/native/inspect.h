// Reads pieces of a file, with the SHA-256 (FIPS 180-4) of each, and whether all of its numbers are finite.
// It knows nothing of experts; callers own every pointer that they pass.
// Read first: the processor's SHA instructions wait for one another within a piece, so two pieces go side by side, in
// little more than the time of one; a stride of each is read, looked at and hashed while the second cache holds it.
#pragma once
#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>

#include <sys/uio.h>

#include "simd.h"

namespace {

// Pieces of memory, filled from an open file where they lie one after the other from `place` on, or full already.
struct Pieces {
  int file;  // -1: they are full
  int wait;  // for a disk; else only what the page cache has is read
  int64_t place;
  uint8_t* const* data;
  const int64_t* sizes;
  uint32_t mask;  // the bits of a number's exponent, twice where numbers have 16 bits
  uint8_t* digests;  // [count, 32]
  uint8_t* finite;  // [count]: 1 unless a number is NaN or infinite
};

#ifdef __SHA__
constexpr int64_t BLOCK = 64;
constexpr int64_t STRIDE = 1024;  // blocks of a piece at a time

alignas(64) constexpr uint32_t ROUND[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

// The eight words of a hash as the instructions want them: A B E F and C D G H, highest first.
struct State {
  __m128i abef = _mm_set_epi32(0x6a09e667, int(0xbb67ae85), 0x510e527f, int(0x9b05688c));
  __m128i cdgh = _mm_set_epi32(0x3c6ef372, int(0xa54ff53a), 0x1f83d9ab, 0x5be0cd19);
};

__m128i big_endian(__m128i x) {
  return _mm_shuffle_epi8(x, _mm_set_epi8(12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3));
}

// Hash `count` blocks into each of N states.
template <int N>
__attribute__((always_inline)) inline void hash(State* const (&to)[N], const uint8_t* const (&data)[N], int64_t count) {
  State s[N];
  for (int n = 0; n < N; ++n) s[n] = *to[n];
  for (int64_t block = 0; block < count; ++block) {
    State before[N];
    __m128i w[N][4];
    for (int n = 0; n < N; ++n) {
      before[n] = s[n];
      for (int i = 0; i < 4; ++i) {
        w[n][i] = big_endian(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data[n] + block * BLOCK) + i));
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {  // four rounds, and the words of those that come four times four later
      const __m128i constants = _mm_load_si128(reinterpret_cast<const __m128i*>(ROUND) + i);
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        __m128i(&x)[4] = w[n];
        const __m128i words = _mm_add_epi32(x[i % 4], constants);
        s[n].cdgh = _mm_sha256rnds2_epu32(s[n].cdgh, s[n].abef, words);
        s[n].abef = _mm_sha256rnds2_epu32(s[n].abef, s[n].cdgh, _mm_shuffle_epi32(words, 0x0e));
        if (i < 12) {
          const __m128i back = _mm_alignr_epi8(x[(i + 3) % 4], x[(i + 2) % 4], 4);
          const __m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(x[i % 4], x[(i + 1) % 4]), back);
          x[i % 4] = _mm_sha256msg2_epu32(sum, x[(i + 3) % 4]);
        }
      }
    }
    for (int n = 0; n < N; ++n) {
      s[n].abef = _mm_add_epi32(s[n].abef, before[n].abef);
      s[n].cdgh = _mm_add_epi32(s[n].cdgh, before[n].cdgh);
    }
  }
  for (int n = 0; n < N; ++n) *to[n] = s[n];
}

// Whether a number of 16 or 32 bits in these bytes has only ones in its exponent, which `mask` shows twice or once.
bool infinite(const uint8_t* data, int64_t bytes, uint32_t mask) {
  const bool narrow = mask >> 16 == (mask & 0xffff);
  bool found = false;
  for (int64_t i = 0; i < bytes; i += BLOCK) found |= any_has(data + i, bytes - i, mask, narrow);
  return found;
}

// One piece on its way.
struct Lane {
  uint8_t* data = nullptr;
  int64_t size = 0, place = 0, piece = -1, done = 0;  // bytes; where it begins in the file; bytes that are hashed
  bool finite = true;
  int error = 0;
  State state;

  int64_t blocks() const { return std::min(STRIDE, (size - done) / BLOCK); }

  // Bring the next bytes and look at them; false where some cannot be had.
  bool take(const Pieces& pieces, int flags, int64_t bytes) {
    for (int64_t got = 0; pieces.file >= 0 && got < bytes;) {
      const iovec to{data + done + got, size_t(bytes - got)};
      const ssize_t more = preadv2(pieces.file, &to, 1, place + done + got, flags);
      if (more < 0 && errno == EINTR) continue;
      if (more <= 0) {
        error = more < 0 ? errno : 0;
        return false;
      }
      got += more;
    }
    finite = finite && !infinite(data + done, bytes, pieces.mask);
    return true;
  }

  void finish(uint8_t* digest) {
    alignas(64) uint8_t last[2 * BLOCK] = {};
    const int64_t rest = size - done, count = rest < BLOCK - 8 ? 1 : 2;
    std::memcpy(last, data + done, size_t(rest));
    last[rest] = 0x80;
    const uint64_t bits = __builtin_bswap64(uint64_t(size) * 8);
    std::memcpy(last + count * BLOCK - 8, &bits, 8);
    hash<1>({&state}, {last}, count);
    alignas(16) uint32_t abef[4], cdgh[4];
    _mm_store_si128(reinterpret_cast<__m128i*>(abef), state.abef);
    _mm_store_si128(reinterpret_cast<__m128i*>(cdgh), state.cdgh);
    const uint32_t words[8] = {abef[3], abef[2], cdgh[3], cdgh[2], abef[1], abef[0], cdgh[1], cdgh[0]};
    for (int i = 0; i < 8; ++i) {
      const uint32_t word = __builtin_bswap32(words[i]);
      std::memcpy(digest + 4 * i, &word, 4);
    }
  }
};

#endif

// Look at `count` of them. Returns how many of the first were done, -1 on a processor without the instructions, or
// -1 - errno where the disk refuses.
int64_t inspect(const Pieces& pieces, int64_t count) {
#ifdef __SHA__
  const int flags = pieces.wait ? 0 : RWF_NOWAIT;
  int error = 0;
  int64_t next = 0, place = pieces.place;
  Lane lanes[2];
  auto& [one, other] = lanes;
  const auto begin = [&](Lane& lane) {
    lane = Lane{};
    if (next >= count) return;
    lane.data = pieces.data[next], lane.size = pieces.sizes[next], lane.place = place, lane.piece = next;
    place += pieces.sizes[next++];
  };
  const auto busy = [&](const Lane& lane) { return lane.piece >= 0 && lane.piece < count; };
  const auto take = [&](Lane& lane, int64_t bytes) {
    if (lane.take(pieces, flags, bytes)) return true;
    count = lane.piece;  // those before it are finished, and no others
    error = lane.error;
    return false;
  };
  for (Lane& lane : lanes) begin(lane);
  while (busy(one) || busy(other)) {
    if (busy(one) && busy(other) && one.blocks() && other.blocks()) {
      const int64_t blocks = std::min(one.blocks(), other.blocks());
      if (!take(one, blocks * BLOCK) || !take(other, blocks * BLOCK)) continue;
      hash<2>({&one.state, &other.state}, {one.data + one.done, other.data + other.done}, blocks);
      one.done += blocks * BLOCK, other.done += blocks * BLOCK;
      continue;
    }
    Lane& lane = !busy(other) || (busy(one) && one.blocks() <= other.blocks()) ? one : other;
    if (const int64_t blocks = lane.blocks()) {
      if (!take(lane, blocks * BLOCK)) continue;
      hash<1>({&lane.state}, {lane.data + lane.done}, blocks);
      lane.done += blocks * BLOCK;
    } else if (take(lane, lane.size - lane.done)) {
      lane.finish(pieces.digests + 32 * lane.piece);
      pieces.finite[lane.piece] = lane.finite;
      begin(lane);
    }
  }
  return pieces.wait && error ? -1 - error : count;
#else
  (void)pieces, (void)count;
  return -1;
#endif
}

}  // namespace
