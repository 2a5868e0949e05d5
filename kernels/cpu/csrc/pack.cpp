// Matrices into panels, as abi.h describes them; and the checksum of what is kept in files.
#include <cmath>
#include <cstring>
#include <vector>

#include "abi.h"

namespace {

int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// A row times Sylvester's matrix H[i][j] = (−1)^popcount(i & j) in blocks of 64, a last one of 32 where k (a multiple of
// 32) is none of 64, over the blocks' sizes. x Wᵀ = (x H)(W H / size)ᵀ: rotated, a token's outliers are spread over a
// block, and one scale a token serves. rows.inc rotates x.
void rotate(float *row, int64_t k) {
  for (int64_t first = 0; first < k; first += 64) {
    const int64_t size = k - first < 64 ? 32 : 64;
    float *x = row + first;
    for (int64_t step = 1; step < size; step *= 2)
      for (int64_t i = 0; i < size; i += 2 * step)
        for (int64_t j = i; j < i + step; j++) {
          const float a = x[j], b = x[j + step];
          x[j] = a + b, x[j + step] = a - b;
        }
    for (int64_t j = 0; j < size; j++) x[j] /= float(size);
  }
}

// Of a panel: bytes of codes; how many scales, and zero points.
int64_t affine_codes(int32_t kind, int64_t kp) { return kp * PW_PANEL / (kind == PW_W4A16 ? 2 : 1); }
int64_t affine_scales(int64_t kp, int32_t group) { return (kp + group - 1) / group * PW_PANEL; }

}  // namespace

extern "C" int64_t pw_packed_bytes(int32_t kind, int32_t n, int32_t k, int32_t group) {
  const int64_t np = up(n, PW_PANEL), kp = up(k, 32);
  if (kind == PW_BF16) return np * kp * 2;
  if (kind == PW_INT8 || kind == PW_W8A8) return np * kp;
  if (kind == PW_W4A16 || kind == PW_W8A16)
    return np / PW_PANEL * (affine_codes(kind, kp) + affine_scales(kp, group) * 4 + up(affine_scales(kp, group), 64));
  return np / PW_PANEL * (kp / PW_GROUP) * PW_PANEL * (2 + 2 + PW_GROUP / 2);
}

extern "C" int pw_pack_bf16(const uint16_t *w, int32_t n, int32_t k, void *out) {
  const int64_t kp = up(k, 32);
  auto *panel = static_cast<uint16_t *>(out);
  memset(out, 0, pw_packed_bytes(PW_BF16, n, k, 0));
  for (int64_t first = 0; first < n; first += PW_PANEL, panel += kp * PW_PANEL)
    for (int64_t c = 0; c < PW_PANEL && first + c < n; c++)
      for (int64_t j = 0; j < k; j++) panel[(j / 2 * PW_PANEL + c) * 2 + j % 2] = w[(first + c) * k + j];
  return 0;
}

extern "C" int pw_pack_int8(const float *w, int32_t n, int32_t k, void *out, float *scale) {
  const int64_t kp = up(k, 32), np = up(n, PW_PANEL);
  auto *panel = static_cast<uint8_t *>(out);
  std::vector<float> row(kp);
  memset(out, 128, pw_packed_bytes(PW_INT8, n, k, 0));
  for (int64_t i = n; i < np; i++) scale[i] = 0;
  for (int64_t first = 0; first < n; first += PW_PANEL, panel += kp * PW_PANEL)
    for (int64_t c = 0; c < PW_PANEL && first + c < n; c++) {
      memcpy(row.data(), w + (first + c) * k, k * sizeof(float));
      for (int64_t j = k; j < kp; j++) row[j] = 0;
      rotate(row.data(), kp);
      float greatest = 0;
      for (int64_t j = 0; j < kp; j++) greatest = fmaxf(greatest, fabsf(row[j]));
      const float s = greatest / 127, divisor = s > 0 ? s : 1;
      scale[first + c] = s;
      // To the nearest, ties to even: 1.5 · 2²³ leaves no room for a fraction, and 128 more in the lowest bits.
      for (int64_t j = 0; j < kp; j++) row[j] = row[j] / divisor + (12582912.0f + 128);
      for (int64_t j = 0; j < kp; j += 4) {
        uint32_t bits[4];
        memcpy(bits, &row[j], sizeof bits);
        for (int i = 0; i < 4; i++) panel[(j / 4 * PW_PANEL + c) * 4 + i] = uint8_t(bits[i]);
      }
    }
  return 0;
}

extern "C" int pw_pack_int4(const uint8_t *codes, const uint16_t *d, const uint16_t *m, int32_t n, int32_t k, void *out) {
  const int64_t groups = up(k, PW_GROUP) / PW_GROUP;
  struct Group {
    uint16_t d[PW_PANEL], m[PW_PANEL];
    uint8_t q[4][PW_PANEL][4];
  };
  auto *panel = static_cast<Group *>(out);
  memset(out, 0, pw_packed_bytes(PW_INT4, n, k, 0));
  for (int64_t first = 0; first < n; first += PW_PANEL, panel += groups)
    for (int64_t c = 0; c < PW_PANEL && first + c < n; c++)
      for (int64_t g = 0; g < groups; g++) {
        panel[g].d[c] = d[(first + c) * groups + g];
        panel[g].m[c] = m[(first + c) * groups + g];
        for (int64_t j = 0; j < PW_GROUP && g * PW_GROUP + j < k; j++)
          panel[g].q[j % 16 / 4][c][j % 4] |= uint8_t(codes[(first + c) * k + g * PW_GROUP + j] << (j / 16 * 4));
      }
  return 0;
}

extern "C" int pw_pack_w8a8(const uint8_t *codes, int32_t n, int32_t k, void *out) {
  const int64_t kp = up(k, 32);
  auto *panel = static_cast<uint8_t *>(out);
  memset(out, 128, pw_packed_bytes(PW_W8A8, n, k, 0));
  for (int64_t first = 0; first < n; first += PW_PANEL, panel += kp * PW_PANEL)
    for (int64_t c = 0; c < PW_PANEL && first + c < n; c++)
      for (int64_t j = 0; j < k; j++) panel[(j / 4 * PW_PANEL + c) * 4 + j % 4] = codes[(first + c) * k + j];
  return 0;
}

extern "C" int pw_pack_affine(int32_t kind, const uint8_t *codes, const float *scales, const uint8_t *zeros, int32_t n,
                              int32_t k, int32_t group, void *out) {
  const int64_t kp = up(k, 32), all = pw_packed_bytes(kind, n, k, group), bytes = all / (up(n, PW_PANEL) / PW_PANEL);
  const int64_t groups = affine_scales(kp, group) / PW_PANEL;
  const int bits = kind == PW_W4A16 ? 4 : 8, word = 32 / bits;  // codes of a word
  memset(out, 0, all);
  auto *panel = static_cast<char *>(out);
  for (int64_t first = 0; first < n; first += PW_PANEL, panel += bytes) {
    auto *words = reinterpret_cast<uint32_t *>(panel);
    auto *scale = reinterpret_cast<float *>(panel + affine_codes(kind, kp));
    auto *zero = reinterpret_cast<uint8_t *>(scale + groups * PW_PANEL);
    for (int64_t c = 0; c < PW_PANEL && first + c < n; c++) {
      for (int64_t g = 0; g < groups; g++) {
        scale[g * PW_PANEL + c] = scales[(first + c) * groups + g];
        zero[g * PW_PANEL + c] = zeros[(first + c) * groups + g];
      }
      for (int64_t j = 0; j < k; j++) {
        const int64_t i = j % word, shift = i / 2 * bits + i % 2 * 16;
        words[j / word * PW_PANEL + c] |= uint32_t(codes[(first + c) * k + j]) << shift;
      }
    }
  }
  return 0;
}

// Eight chains of multiplications, which no compiler should turn into the vectors' many for one.
extern "C"
#if defined(__GNUC__) && !defined(__clang__)
    __attribute__((optimize("no-tree-vectorize")))
#endif
    uint64_t pw_checksum(const void *data, int64_t bytes) {
  constexpr uint64_t prime = 0x9E3779B185EBCA87;
  uint64_t lanes[8], words[8];
  for (uint64_t i = 0; i < 8; i++) lanes[i] = (i + 1) * prime;
  auto mix = [&lanes](const uint64_t(&some)[8]) {
    for (int i = 0; i < 8; i++) {
      const uint64_t x = (lanes[i] ^ some[i]) * prime;
      lanes[i] = x ^ x >> 32;
    }
  };
  const char *at = static_cast<const char *>(data), *end = at + bytes;
  for (; end - at >= 64; at += 64) {
    memcpy(words, at, 64);
    mix(words);
  }
  memset(words, 0, sizeof words);
  memcpy(words, at, end - at);
  mix(words);
  uint64_t h = uint64_t(bytes) * prime;
  for (uint64_t lane : lanes) {
    h = (h ^ lane) * prime;
    h ^= h >> 32;
  }
  return h;
}
