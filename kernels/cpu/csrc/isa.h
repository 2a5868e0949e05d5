// What each instruction set implements, and how a step reaches it: one table of functions, chosen once by cpuid.
//
// gemm.inc, rows.inc, attention.inc and sampling.inc are compiled once for each set, inside a namespace of its own, by
// isa_*.cpp. They use no templates of the standard library: a linker may keep any one copy of those, and the kept one
// could hold instructions that this host lacks.
#pragma once
#include <cstdint>

#include "abi.h"
#include "team.h"

namespace pw {

constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }

// Rows of activations in the form that a kind of weight multiplies: `data` bfloat16 bits (PW_BF16) or int8, of rows
// `stride` elements apart (k rounded up to 32, zeros beyond k).
struct Operand {
  int32_t kind;    // of the weights it is for
  int64_t stride;  // elements
  void *data;
  float *scale;    // x = scale · q. PW_INT8 [rows]: one a token; PW_INT4 [rows][kp / 32]: one for each of its groups
  int32_t *sums;   // PW_INT8 [rows]: Σ q
  float *offsets;  // PW_INT4 [rows][kp / 32]: scale · Σ q of each group
};

// What adapters add to a product of some rows.
struct Addition {
  const pw_lora *const *rows;  // [rows] each one's first of layer 0; null: it has no adapter
  int offset, sections;        // of this layer and product, from there
  int32_t begins[3];           // columns, multiples of 16: of q, k and v. Panels of gate and up alternate
  const uint16_t *shrunk;      // bfloat16 [rows][sections][ld] scale · A x
  int64_t ld;
};

enum class Then { store, add, glu };  // what becomes of y = x Wᵀ + b

struct Output {
  Then then;
  float *c;         // store: c = y; add: c += y; glu: c = act(gate) · up, float32 [rows, ldc]
  int64_t ldc;
  uint16_t *c_bf16; // glu: where not null, instead of c: the same as bfloat16 bits, [rows, ldc]
  int32_t activation;
  const pw_weight *next = nullptr;  // what is multiplied after this: it is fetched towards the end
  const Addition *addition = nullptr;
};

struct Best { float value; int32_t index; };  // of a row: greatest logit, lowest index among equals

// Everything about one layer's attention that does not change within a step.
struct AttentionShape {
  int32_t num_heads, num_kv_heads, head_dim, rotary_dim, kv_kind, block_size, num_blocks;
  float norm_eps, scale, softcap;
  const float *cos, *sin;  // [max_model_len, rotary_dim / 2], of layers that have none of their own
};

// The functions marked "team" are called by every thread of the team inside Team::run, share the work among them, and
// return when all of it is done, as Team::share does.
struct Kernels {
  const char *name;
  bool (*supported)();

  // gemm.inc
  void (*gemm)(Team &, int thread, const pw_weight &, const Operand &, int rows, const Output &);            // team
  void (*gemm_argmax)(Team &, int thread, const pw_weight &, const Operand &, int rows, float softcap,
                      Best *best /* [threads][rows]: this thread's own, written whole */);                    // team
  // lora.inc: one row, alone. x bfloat16 [k rounded up to 32], out [sections][ld]; those of no adapter stay as they are
  void (*shrink)(const uint16_t *x, int k, const pw_lora *loras, int sections, uint16_t *out, int64_t ld);
  // rows.inc: one row each, alone
  void (*embed)(const pw_spec &, int64_t token, float *x /* [hidden] */);
  void (*normalize)(const float *x, const float *weight, float eps, int k, float *y);
  void (*add_normed)(const float *y, const float *weight, float eps, int k, float *x);  // x += norm(y) · weight
  void (*prepare)(const float *x, const float *norm_weight /* or null: as it is */, float eps, int k,
                  const Operand &, int row);  // norm, then rounding or quantizing into the operand's row
  void (*soften)(float *logits, int count, float cap);  // isa.inc: the softcap that gemm_argmax applies
  // attention.inc and kv.inc
  bool (*attention_fits)(const AttentionShape &);  // head_dim a multiple of 16, at most 256; whole groups of heads; …
  int64_t (*page_bytes)(const AttentionShape &);  // of one layer, one kv head, PW_PAGE tokens
  // One token: QK norm and rope on its q heads in place, K and V (after norm and rope) into its page.
  // qkv float32 [(heads + 2 kv heads) · dim]; pages: this layer's, page (block · block_size/32 + i) · kv_heads + head.
  void (*write_kv)(const AttentionShape &, const pw_layer &, float *qkv, int64_t position, int64_t slot, char *pages);
  // A step's work, the same for all of its layers, planned once by one thread into `scratch`: attend_bytes, 64-byte
  // aligned, kept until the step's last attend.
  int64_t (*attend_bytes)(const AttentionShape &, const pw_batch &, int threads);
  void (*attend_plan)(const AttentionShape &, const pw_batch &, int threads, char *scratch);
  // Every row of the batch: q from qkv [T, ld], out float32 [T, heads · dim].
  void (*attend)(Team &, int thread, const AttentionShape &, int window, const pw_batch &, const float *qkv, int64_t ld,
                 const char *pages, float *out, char *scratch);                                               // team
  // sampling.inc: one output each, alone; `logits` float32 [vocab], after the softcap; scratch: sampling_scratch bytes,
  // 64-byte aligned. −1 for a row that is not numbers or has nothing allowed: −1 or −2 stands for its token id then
  // (−1 for its rank, of score).
  int64_t (*sampling_scratch)(int vocab);
  int (*sample)(const float *logits, int vocab, const pw_samples &, int output, char *scratch);
  int (*score)(const float *logits, int vocab, int64_t token, int num_top, int max_top, double *logprob, int64_t *rank,
               int64_t *top_ids, double *top_logprobs, char *scratch);
};

extern const Kernels kernels_avx512_bf16, kernels_avx512_vnni, kernels_avx2, kernels_generic;

const Kernels *find_kernels(const char *isa);  // "auto": the best this host can run. Null: none that it can run
const char *kernel_names();                    // those this host can run, best first, space separated

}  // namespace pw
