// A model that is open: weights that are the caller's, KV pages, a team of threads, and the buffers of a step.
#pragma once
#include <cstddef>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "abi.h"
#include "isa.h"
#include "team.h"

namespace pw {

// What a caller did wrong, or what could not be had: its text is pw_error().
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

// Anonymous memory, in huge pages where the kernel has them: zeros at first. Throws Error.
class Memory {
 public:
  Memory() = default;
  ~Memory();
  Memory(const Memory &) = delete;
  Memory &operator=(const Memory &) = delete;

  void reserve(size_t bytes, const char *what);  // at least so much; what was there is lost where it has to grow
  template <class T>
  T *as() const { return static_cast<T *>(data_); }

 private:
  void *data_ = nullptr;
  size_t bytes_ = 0;
};

// Rows that a weight multiplies. Where each thread prepares its own, `copies` of them.
class Rows {
 public:
  void reserve(const pw_weight &, int rows, int copies);
  Operand operand(const pw_weight &, int copy) const;

 private:
  size_t bytes_ = 0;  // of one copy
  int rows_ = 0;
  Memory memory_;
};

enum class Phase { embed, norm, qkv, write_kv, attend, o, gate_up, down, head, sample, wait, count };
constexpr const char *PHASES = "embed norm qkv write_kv attend o gate_up down head sample wait";

// Where thread 0's time goes, in ticks that `seconds` turns into seconds.
class Clock {
 public:
  explicit Clock(const Team &team) : team_(team) {}
  void clear();  // a step begins
  void start();
  void stop();
  void mark(Phase phase) {  // what was done since the last mark; what of it was waiting is told apart
    const uint64_t now = ticks(), waited = team_.waited(0);
    spent_[int(phase)] += now - last_ - (waited - waited_);
    spent_[int(Phase::wait)] += waited - waited_;
    last_ = now, waited_ = waited;
  }
  void seconds(double *out) const;  // [count]

 private:
  const Team &team_;
  uint64_t last_ = 0, waited_ = 0, begun_ = 0, total_ticks_ = 0, spent_[int(Phase::count)] = {};
  int64_t begun_ns_ = 0, total_ns_ = 0;
};

struct Model {
  Model(const pw_spec &, int threads, int cpus, const char *isa);
  Model(const pw_spec &, const Model &beside);  // on its threads; a head outlives the model that it drafts for no step

  const pw_spec spec;
  const std::vector<pw_layer> layers;
  const std::vector<int32_t> taps;
  const Model *const target;  // of a head: the model that it drafts for; or null
  const Kernels &kernels;
  const AttentionShape shape;
  const std::shared_ptr<Team> shared_team;
  Team &team = *shared_team;
  Clock clock{team};
  Memory kv;  // [layer][page][kv head]
  size_t kv_layer_bytes;
  Memory tapped;  // bfloat16 [slot][tap][hidden]

  // The last forward's, [tokens, …]: `x` holds the residual, and outputs are made from it until the next one — or from
  // `last_x`, where the last layer was computed for some tokens alone: token t is row rows[t], or −1 of none.
  int num_tokens = 0;
  Memory x, qkv, attended, gated, unnormed, attend_scratch, last_x, last_qkv, last_scratch;
  std::vector<std::vector<pw_lora>> adapters;  // by index, [layers][PW_LORAS]; empty: there is none
  Memory shrunk, lora_rows;  // what they make of x; and x as bfloat16: a row of `lora_columns` for each thread
  int64_t lora_columns;
  Memory reordered;    // rows whose columns go in another order: one for each thread
  int64_t widest = 0;  // floats of one
  std::vector<int32_t> rows;  // [tokens]; empty where all were computed
  Rows hidden_rows, attended_rows, gated_rows;
  Memory fusing, joined;  // of a head: rows of fuse and of its layer
  Rows fuse_rows;
  // Outputs.
  Rows wanted_rows;
  Memory logits, best, sample_scratch;

  Model(const pw_spec &, const Kernels &, std::shared_ptr<Team>, const Model *target);
  int64_t row_of(int64_t token) const { return rows.empty() ? token : rows[token]; }
  const float *residual(int64_t token) const {
    return (rows.empty() ? x : last_x).as<float>() + row_of(token) * spec.hidden_size;
  }
  void set_adapter(int index, const pw_lora *loras);
  void forward(const pw_batch &);
  void sample(const pw_samples &);
  void write_logits(const int64_t *tokens, int count, float *out);
  void write_hidden(const int64_t *tokens, int count, float *out);
  void write_states(const int64_t *tokens, int count, float *out);
  void score(const int64_t *tokens, const int64_t *token_ids, const int32_t *num_top, int count, int max_top,
             double *logprobs, int64_t *ranks, int64_t *top_ids, double *top_logprobs);
};

// What would have the step read or write where it must not. Throw Error, naming field and limit.
void check_spec(const pw_spec &, const Model *target);
void check_adapter(const Model &, int index, const pw_lora *);
void check_batch(const Model &, const pw_batch &);
void check_samples(const Model &, const pw_samples &);
void check_tokens(const Model &, const int64_t *tokens, int count);

AttentionShape attention_shape(const pw_spec &);
int64_t kv_block_bytes(const pw_spec &);

}  // namespace pw

struct pw_model : pw::Model {
  using pw::Model::Model;
};
