// The plain C ABI of the CPU step: one call of pw_step (or pw_forward, then pw_sample) is one step of a worker.
//
// Everything that is passed in stays the caller's. Every function that returns int answers 0, or −1 with a reason in
// pw_error(). A model is used by one thread at a time. Fields are only ever appended, and PW_ABI raised where one is.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

#define PW_ABI 6
#define PW_PANEL 48     // columns of a packed panel
#define PW_GROUP 32     // weights that share a scale in PW_INT4
#define PW_PAGE 32      // tokens of a KV page; block_size is a multiple of it
#define PW_KV_TILE 64   // tokens that attention takes at a time, at absolute positions: multiples of this

// A matrix W[n, k] of y = x Wᵀ, in panels of 48 columns n. np = n rounded up to 48, kp = k rounded up to 32; what is
// beyond n and k weighs nothing. One layout serves every instruction set.
//   PW_BF16  uint16 [np/48][kp/2][48][2]                       bfloat16 bits
//   PW_INT8  uint8  [np/48][kp/4][48][4]                       q + 128;   w H / 64 = scale[n] · q, H Hadamard's matrix
//                                                              over blocks of 64 of k (a last one of 32 / 32)
//   PW_INT4  [np/48][kp/32] of { uint16 d[48], m[48]; uint8 q[4][48][4] }   float16 d and m;   w = d · q + m
//            q[t][n][i]: low nibble is k = 4 t + i of the group, high nibble is k = 16 + 4 t + i
//   PW_W8A8  as PW_INT8, of w as it is:                        w = scale[n] · q
//   PW_W4A16, PW_W8A16  each panel: codes, then float scales[G][48], then uint8 zeros[G][48] up to a whole 64 bytes;
//            G = ⌈kp / group⌉;   w = scale · (code − zero);   multiplied by bfloat16, as PW_BF16 is
//            codes of 4 bits: uint32 [kp/8][48], of 8: uint32 [kp/4][48]; of a word's the pair (2 i, 2 i + 1) is in the
//            i-th nibble, or byte, of its lower and of its upper half
// A kind of bfloat16 rows or PW_INT8, PW_W8A8 may have a scale for each column beside; the latter two must.
enum { PW_BF16 = 0, PW_INT8 = 1, PW_INT4 = 2, PW_W8A8 = 3, PW_W4A16 = 4, PW_W8A16 = 5 };
enum { PW_KV_BF16 = 0, PW_KV_INT8 = 1 };
enum { PW_SILU = 0, PW_GELU = 1, PW_GELU_TANH = 2 };

typedef struct {
  int32_t kind, n, k;
  const void *data;    // 64-byte aligned
  const float *scale;  // [np]: of y's columns; or null
  const float *bias;   // [np] or null
  int32_t group;       // PW_W4A16, PW_W8A16: weights of a column that share a scale, a multiple of 32
  const int32_t *order;  // [k] y = x[order] Wᵀ; or null: as x is
} pw_weight;

typedef struct {
  pw_weight qkv;      // rows: all q heads, then all k heads, then all v heads
  pw_weight o;
  pw_weight gate_up;  // panels alternate: 48 columns of gate, the same 48 of up; n = 2 · intermediate rounded up to 48
  pw_weight down;
  const float *attn_norm, *mlp_norm;  // [hidden]
  const float *q_norm, *k_norm;       // [head_dim] or null
  int32_t window;                     // positions seen, the token's own included; 0 is all
  const float *attn_post_norm, *mlp_post_norm;  // [hidden] of what o and down give, before it is added; or null
  const float *cos, *sin;             // as the spec's, for this layer; or null: the spec's
} pw_layer;

typedef struct {
  int32_t abi;  // PW_ABI
  int32_t vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim;
  int32_t rotary_dim, max_model_len, activation;
  int32_t kv_kind, block_size, num_blocks;  // blocks of `block_size` tokens; block 0 is the null block
  float norm_eps, attention_scale, attention_softcap, logit_softcap, embedding_scale;  // a softcap of 0 is off
  const float *cos, *sin;     // [max_model_len, rotary_dim / 2]; dimensions (j, j + rotary_dim / 2) turn together
  const uint16_t *embed;      // bfloat16 [vocab, hidden]; null: rows of lm_head, which is PW_BF16 then
  const float *final_norm;    // [hidden]
  pw_weight lm_head;
  const pw_layer *layers;
  // Of a model that a head drafts for: layers whose input is kept of each token, as bfloat16 beside its keys and values,
  // for as long as its block is; or null.
  const int32_t *taps;
  int32_t num_taps;
  // Of such a head, EAGLE-3's (Li et al. 2025), which is opened beside its model; data is null in any other:
  //   state[t] = fuse · taps[t], or what the head itself made of the token before, see pw_batch.states
  //   layer 0: qkv of (embed_norm(embed[token t + 1]), state_norm(state[t])), 2 · hidden_size wide; residual state[t]
  // attn_norm of its layer is not used. Where `embed` is null it has its model's, and its model's token ids in any case.
  pw_weight fuse;  // [hidden, num_taps · hidden]
  const float *embed_norm, *state_norm;  // [hidden]
} pw_spec;

// What an adapter adds to a section of a product's columns, for the rows that name it: y += scale · B (A x). One each of
// q, k, v; o; gate, up; down: PW_LORAS a layer. Products of bfloat16; A x is rounded to it as well.
#define PW_LORAS 7
#define PW_MAX_ADAPTERS 1024
typedef struct {
  const uint16_t *a;  // [rank / 16][kp / 2][16][2], kp = x's columns rounded up to 32; or null: nothing is added
  const uint16_t *b;  // [np / 16][rank / 2][16][2], np = the section's columns rounded up to 48
  float scale;
  int32_t rank;       // a multiple of 16
} pw_lora;

typedef struct pw_model pw_model;

int32_t pw_abi(void);
const char *pw_error(void);                                  // of this thread's last failure
const char *pw_isas(void);                                   // names this host can run, best first: "avx512_bf16 …"
// Null: failed. `isa` "auto" is the best. `cpus`: how many this process may use at once; more threads than those never
// spin. Holds on to everything that the spec points to, until pw_close.
pw_model *pw_open(const pw_spec *, int32_t threads, int32_t cpus, const char *isa);
// The same with another model's instructions and threads, which may outlive it: the two are used by one thread at a time.
pw_model *pw_open_beside(const pw_spec *, const pw_model *);
void pw_close(pw_model *);
const char *pw_isa(const pw_model *);
int64_t pw_kv_block_bytes(const pw_spec *);                  // of one block, all layers
void *pw_kv(const pw_model *);                               // its pages: [layer][block], each block's bytes together

// One step's tokens, as worker_svc.inputs.StepInputs has them. Rows are of distinct sequences.
typedef struct {
  int32_t num_rows, num_tokens;
  const int64_t *cu;            // [R + 1] row i is tokens cu[i] … cu[i + 1] − 1
  const int64_t *context_lens;  // [R] tokens seen by the row's last token, itself included
  const int64_t *token_ids, *positions, *slot_mapping;  // [T]; slot_mapping = block · block_size + offset
  const int64_t *block_tables;  // [R, table_stride]
  int64_t table_stride;
  const int32_t *adapters;      // [R] of each row, as pw_set_adapter's index, or 0 of none; null: none has any
  // Tokens that outputs may be asked of, ascending; null: any. The last layer is computed for them alone.
  const int64_t *wanted;
  int64_t num_wanted;
  // Of a head: [T, hidden] what pw_states gave of the tokens before these; null: what its model's taps hold of the same
  // slots. Token ids are those behind the tokens whose states these are.
  const float *states;
} pw_batch;

// Outputs wanted of the last forward. S of them, each for one of its tokens, in any order, repeats allowed.
typedef struct {
  float temperature, min_p, repetition, presence, frequency;
  int32_t logprobs;   // how many alternatives; −1: no logprobs at all
  int64_t top_k;      // ≤ 0 is off
  double top_p;
  uint64_t seed;
  int64_t position;   // absolute, of the token to be sampled: the counter of its noise
} pw_params;

typedef struct {
  int32_t num;
  const int64_t *tokens;       // [S] indices into T
  const pw_params *params;     // [S]
  // Edits as worker_svc.logit_edits.Edits has them: flat indices are output · vocab_size + token.
  int64_t num_bias, num_bans, num_penalties;
  const int64_t *bias_at;      const float *bias;
  const int64_t *ban_at;
  const int64_t *penalty_at, *penalty_counts;
  const int32_t *mask_rows;    // [S] row of `bitmask`, −1 is unmasked; null: none is masked
  const uint32_t *bitmask;     // [rows, ceil(vocab / 32)] bit i of word w is token 32 w + i
  int32_t max_top;             // columns of top_*
  int64_t *token_ids;          // out [S]
  double *logprobs;            // out [S], for those that asked; null where none did
  int64_t *ranks;              // out [S]
  int64_t *top_ids;            // out [S, max_top]
  double *top_logprobs;        // out [S, max_top]
} pw_samples;

// Rows may name `index`, 1 … PW_MAX_ADAPTERS, from the next step on. `loras` [layers][PW_LORAS]; what they point to is
// held on to until it is set anew. Null: no row names it any more.
int pw_set_adapter(pw_model *, int32_t index, const pw_lora *loras);

int pw_forward(pw_model *, const pw_batch *);
int pw_sample(pw_model *, const pw_samples *);
int pw_step(pw_model *, const pw_batch *, const pw_samples *);  // both, where no row is masked
// Of the last forward, for any of its tokens [count]: raw logits [count, vocab]; hidden states after the final norm
// [count, hidden]; scores of given tokens under the raw distribution, as the logprobs of pw_sample.
int pw_logits(pw_model *, const int64_t *tokens, int32_t count, float *out);
int pw_hidden(pw_model *, const int64_t *tokens, int32_t count, float *out);
int pw_states(pw_model *, const int64_t *tokens, int32_t count, float *out);  // … before the final norm
int pw_score(pw_model *, const int64_t *tokens, const int64_t *token_ids, const int32_t *num_top, int32_t count,
             int32_t max_top, double *logprobs, int64_t *ranks, int64_t *top_ids, double *top_logprobs);

// Where the last step's time went, seconds by phase, on thread 0. Names: pw_phases(), space separated.
const char *pw_phases(void);
int pw_timings(const pw_model *, double *out);

// Packing, from row-major matrices; `threads` of them at work. Sizes: pw_packed_bytes(kind, n, k, group).
int64_t pw_packed_bytes(int32_t kind, int32_t n, int32_t k, int32_t group);
int pw_pack_bf16(const uint16_t *w, int32_t n, int32_t k, void *out);
int pw_pack_int8(const float *w, int32_t n, int32_t k, void *out, float *scale);  // chooses q and scale [np]
// Codes 0…15 [n, k], float16 bits of d and m [n, ceil(k/32)]; keeps them as they are.
int pw_pack_int4(const uint8_t *codes, const uint16_t *d, const uint16_t *m, int32_t n, int32_t k, void *out);
// Codes [n, k] of W8A8 (q + 128), or with scales and zeros [n, ⌈k/group⌉] of W4A16 or W8A16; kept as they are.
int pw_pack_w8a8(const uint8_t *codes, int32_t n, int32_t k, void *out);
int pw_pack_affine(int32_t kind, const uint8_t *codes, const float *scales, const uint8_t *zeros, int32_t n, int32_t k,
                   int32_t group, void *out);
uint64_t pw_checksum(const void *data, int64_t bytes);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
