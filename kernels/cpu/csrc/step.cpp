// A step's forward: one run of the team. Each phase is shared, and done before the next begins: what a thread reads,
// any other may have written.
//
//   embed → per layer: norm → qkv → write_kv → attend → o (+ residual) → norm → gate_up → down (+ residual)
//
// Where what o and down give is normed before it is added, that is a phase of its own.
//
// Each element is made by one thread in one order, so who made it never shows.
#include "model.h"

#include <cstring>

namespace pw {
namespace {

constexpr int FEW = 4;    // rows that every thread prepares for itself: that is quicker than to wait for others
constexpr int BLOCK = 4;  // rows prepared at a time, where they are shared

// What a layer's second half is computed for: all tokens, or in the last layer those whose outputs are wanted.
struct Part {
  const pw_batch *batch;
  int rows;
  float *x, *qkv;
  char *scratch;  // attention's plan
};

// The wanted tokens as a batch of their own: what attention reads of one. A row is a run of tokens that follow each
// other, with a copy of its sequence's table.
struct Wanted {
  std::vector<int64_t> cu, context_lens, positions, tables;
  pw_batch batch{};

  explicit Wanted(const pw_batch &b) {
    if (!pruned(b)) return;
    int row = 0;
    for (int64_t i = 0; i < b.num_wanted; i++) {
      const int64_t token = b.wanted[i];
      const bool follows = i && token == b.wanted[i - 1] + 1 && token < b.cu[row + 1];
      while (token >= b.cu[row + 1]) row++;
      if (!follows) {
        cu.push_back(i);
        context_lens.push_back(0);
        const int64_t *table = b.block_tables + row * b.table_stride;
        tables.insert(tables.end(), table, table + b.table_stride);
      }
      positions.push_back(b.positions[token]);
      context_lens.back() = b.positions[token] + 1;
    }
    batch.num_rows = int32_t(cu.size());
    batch.num_tokens = int32_t(b.num_wanted);
    cu.push_back(b.num_wanted);
    batch.cu = cu.data(), batch.context_lens = context_lens.data(), batch.positions = positions.data();
    batch.block_tables = tables.data(), batch.table_stride = b.table_stride;
  }

  static bool pruned(const pw_batch &b) { return b.wanted && b.num_wanted < b.num_tokens; }
};

class Forward {
 public:
  Forward(Model &model, const pw_batch &batch)
      : m_(model), b_(batch), wanted_(batch), some_(Wanted::pruned(batch)) {
    const pw_spec &s = m_.spec;
    const pw_layer &first = m_.layers[0];
    const int rows = b_.num_tokens, copies = few() ? m_.team.size() : 1;
    qkv_ld_ = round_up(first.qkv.n, PW_PANEL);
    m_.attended.reserve(size_t(rows) * first.o.k * sizeof(float), "attention's results");
    for (const pw_layer &layer : m_.layers)
      if (layer.attn_post_norm || layer.mlp_post_norm)
        m_.unnormed.reserve(size_t(rows) * s.hidden_size * sizeof(float), "what is normed before it is added");
    m_.gated.reserve(size_t(rows) * round_up(s.intermediate_size, 32) * sizeof(float), "gated rows");
    m_.hidden_rows.reserve(first.qkv, rows, copies);
    m_.attended_rows.reserve(first.o, rows, copies);
    m_.gated_rows.reserve(first.down, rows, copies);
    all_ = part(b_, m_.x, m_.qkv, m_.attend_scratch);
    last_ = some_ ? part(wanted_.batch, m_.last_x, m_.last_qkv, m_.last_scratch) : all_;
    m_.rows.clear();
    if (some_) m_.rows.assign(size_t(rows), -1);
    for (int i = 0; some_ && i < last_.rows; i++) m_.rows[size_t(b_.wanted[i])] = i;
  }

  void operator()(int thread) {
    const pw_spec &s = m_.spec;
    auto item = [&](int, int i) { m_.kernels.embed(s, b_.token_ids[i], all_.x + int64_t(i) * s.hidden_size); };
    m_.team.share(thread, all_.rows, item);
    mark(thread, Phase::embed);
    char *pages = m_.kv.as<char>();
    for (const pw_layer &layer : m_.layers) {
      write_kv(thread, layer, pages);
      const bool last = &layer == &m_.layers.back();
      if (last && some_) gather(thread);
      const Part &part = last ? last_ : all_;
      if (part.rows) attention(thread, layer, pages, part);
      if (part.rows) mlp(thread, layer, part);
      pages += m_.kv_layer_bytes;
    }
  }

 private:
  Part part(const pw_batch &batch, Memory &x, Memory &qkv, Memory &scratch) {
    const int rows = batch.num_tokens, threads = m_.team.size();
    x.reserve(size_t(rows) * m_.spec.hidden_size * sizeof(float), "residual");
    qkv.reserve(size_t(rows) * qkv_ld_ * sizeof(float), "queries");
    scratch.reserve(size_t(m_.kernels.attend_bytes(m_.shape, batch, threads)), "attention's plan");
    m_.kernels.attend_plan(m_.shape, batch, threads, scratch.as<char>());
    return {&batch, rows, x.as<float>(), qkv.as<float>(), scratch.as<char>()};
  }

  // Queries of all tokens, turned; keys and values into their pages.
  void write_kv(int thread, const pw_layer &layer, char *pages) {
    const Operand normed = prepare(thread, layer.qkv, m_.hidden_rows, all_.rows, all_.x, layer.attn_norm);
    m_.kernels.gemm(m_.team, thread, layer.qkv, normed, all_.rows,
                    {Then::store, all_.qkv, qkv_ld_, nullptr, 0, &layer.o});
    mark(thread, Phase::qkv);
    auto item = [&](int, int i) {
      m_.kernels.write_kv(m_.shape, layer, all_.qkv + i * qkv_ld_, b_.positions[i], b_.slot_mapping[i], pages);
    };
    m_.team.share(thread, all_.rows, item);
    mark(thread, Phase::write_kv);
  }

  // The wanted tokens' queries and residuals, moved together.
  void gather(int thread) {
    const int64_t width = m_.spec.hidden_size, queries = m_.layers[0].o.k;
    auto item = [&](int, int i) {
      memcpy(last_.x + i * width, all_.x + b_.wanted[i] * width, size_t(width) * sizeof(float));
      memcpy(last_.qkv + i * qkv_ld_, all_.qkv + b_.wanted[i] * qkv_ld_, size_t(queries) * sizeof(float));
    };
    m_.team.share(thread, last_.rows, item);
    mark(thread, Phase::norm);
  }

  void attention(int thread, const pw_layer &layer, const char *pages, const Part &part) {
    float *attended = m_.attended.as<float>();
    m_.kernels.attend(m_.team, thread, m_.shape, layer.window, *part.batch, part.qkv, qkv_ld_, pages, attended,
                      part.scratch);
    mark(thread, Phase::attend);
    const Operand seen = prepare(thread, layer.o, m_.attended_rows, part.rows, attended, nullptr, layer.o.k);
    add(thread, layer.o, seen, part, layer.attn_post_norm, &layer.gate_up, Phase::o);
  }

  // A product onto the residual, normed first where there is a norm. `next` is the product that follows.
  void add(int thread, const pw_weight &w, const Operand &operand, const Part &part, const float *norm,
           const pw_weight *next, Phase phase) {
    const int64_t width = m_.spec.hidden_size;
    float *y = m_.unnormed.as<float>();
    const Output out = norm ? Output{Then::store, y, width, nullptr, 0, next}
                            : Output{Then::add, part.x, width, nullptr, 0, next};
    m_.kernels.gemm(m_.team, thread, w, operand, part.rows, out);
    mark(thread, phase);
    if (!norm) return;
    auto item = [&](int, int i) {
      m_.kernels.add_normed(y + i * width, norm, m_.spec.norm_eps, int(width), part.x + i * width);
    };
    m_.team.share(thread, part.rows, item);
    mark(thread, Phase::norm);
  }

  // What a layer's last product is followed by: the next layer, or the head.
  const pw_weight *after(const pw_layer &layer) const {
    return &layer == &m_.layers.back() ? &m_.spec.lm_head : &(&layer)[1].qkv;
  }

  void mlp(int thread, const pw_layer &layer, const Part &part) {
    const int activation = m_.spec.activation;
    const Operand normed = prepare(thread, layer.gate_up, m_.hidden_rows, part.rows, part.x, layer.mlp_norm);
    const int64_t width = round_up(layer.down.k, 32);
    // What the epilogue rounds is the operand already, unless a part of its padding would be left unwritten.
    const bool direct = layer.down.kind == PW_BF16 && width <= layer.gate_up.n / 2;
    Operand gated = m_.gated_rows.operand(layer.down, 0);
    auto *rounded = static_cast<uint16_t *>(gated.data);
    const Output out = direct ? Output{Then::glu, nullptr, gated.stride, rounded, activation, &layer.down}
                              : Output{Then::glu, m_.gated.as<float>(), width, nullptr, activation, &layer.down};
    m_.kernels.gemm(m_.team, thread, layer.gate_up, normed, part.rows, out);
    mark(thread, Phase::gate_up);

    if (!direct) gated = prepare(thread, layer.down, m_.gated_rows, part.rows, m_.gated.as<float>(), nullptr, width);
    add(thread, layer.down, gated, part, layer.mlp_post_norm, after(layer), Phase::down);
  }

  bool few() const { return b_.num_tokens <= FEW; }

  // `rows` of `x`, `ld` apart, as what `w` multiplies.
  Operand prepare(int thread, const pw_weight &w, const Rows &to, int rows, const float *x, const float *norm,
                  int64_t ld = 0) {
    if (!ld) ld = m_.spec.hidden_size;
    const Operand out = to.operand(w, few() ? thread : 0);
    float *moved = m_.reordered.as<float>() + int64_t(thread) * m_.widest;
    auto item = [&](int, int block) {
      for (int i = block * BLOCK; i < (block + 1) * BLOCK && i < rows; i++) {
        const float *row = x + i * ld;
        if (w.order) {
          for (int j = 0; j < w.k; j++) moved[j] = row[w.order[j]];
          row = moved;
        }
        m_.kernels.prepare(row, norm, m_.spec.norm_eps, w.k, out, i);
      }
    };
    if (few())
      item(thread, 0);
    else
      m_.team.share(thread, (rows + BLOCK - 1) / BLOCK, item);
    mark(thread, Phase::norm);
    return out;
  }

  void mark(int thread, Phase phase) {
    if (thread == 0) m_.clock.mark(phase);
  }

  Model &m_;
  const pw_batch &b_;
  const Wanted wanted_;
  const bool some_;
  int64_t qkv_ld_;
  Part all_, last_;
};

static_assert(FEW <= BLOCK, "a thread that prepares rows for itself prepares one block");

}  // namespace

void Model::forward(const pw_batch &batch) {
  check_batch(*this, batch);
  num_tokens = 0;  // until this succeeds, there is nothing to make outputs of
  clock.clear();
  clock.start();
  if (batch.num_tokens) {
    Forward body(*this, batch);
    team.run(body);
  }
  clock.stop();
  num_tokens = batch.num_tokens;
}

}  // namespace pw
