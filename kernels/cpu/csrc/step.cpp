// A step's forward: one run of the team. Each phase is shared, and done before the next begins: what a thread reads,
// any other may have written.
//
//   embed → per layer: norm → qkv → write_kv → attend → o (+ residual) → norm → gate_up → down (+ residual)
//
// Each element is made by one thread in one order, so who made it never shows.
#include "model.h"

namespace pw {
namespace {

constexpr int FEW = 4;    // rows that every thread prepares for itself: that is quicker than to wait for others
constexpr int BLOCK = 4;  // rows prepared at a time, where they are shared

class Forward {
 public:
  Forward(Model &model, const pw_batch &batch) : m_(model), b_(batch), rows_(batch.num_tokens) {
    const pw_spec &s = m_.spec;
    const pw_layer &first = m_.layers[0];
    const int copies = rows_ <= FEW ? m_.team.size() : 1;
    qkv_ld_ = round_up(first.qkv.n, PW_PANEL);
    m_.x.reserve(size_t(rows_) * s.hidden_size * sizeof(float), "residual");
    m_.qkv.reserve(size_t(rows_) * qkv_ld_ * sizeof(float), "queries");
    m_.attended.reserve(size_t(rows_) * first.o.k * sizeof(float), "attention's results");
    m_.gated.reserve(size_t(rows_) * round_up(s.intermediate_size, 32) * sizeof(float), "gated rows");
    m_.hidden_rows.reserve(first.qkv, rows_, copies);
    m_.attended_rows.reserve(first.o, rows_, copies);
    m_.gated_rows.reserve(first.down, rows_, copies);
    const int threads = m_.team.size();
    m_.attend_scratch.reserve(size_t(m_.kernels.attend_bytes(m_.shape, b_, threads)), "attention's plan");
    m_.kernels.attend_plan(m_.shape, b_, threads, m_.attend_scratch.as<char>());
  }

  void operator()(int thread) {
    const pw_spec &s = m_.spec;
    auto item = [&](int, int i) {
      m_.kernels.embed(s, b_.token_ids[i], m_.x.as<float>() + int64_t(i) * s.hidden_size);
    };
    m_.team.share(thread, rows_, item);
    mark(thread, Phase::embed);
    char *pages = m_.kv.as<char>();
    for (const pw_layer &layer : m_.layers) {
      attention(thread, layer, pages);
      mlp(thread, layer);
      pages += m_.kv_layer_bytes;
    }
  }

 private:
  void attention(int thread, const pw_layer &layer, char *pages) {
    const int64_t width = layer.o.k;
    float *qkv = m_.qkv.as<float>(), *attended = m_.attended.as<float>(), *x = m_.x.as<float>();
    const Operand normed = prepare(thread, layer.qkv, m_.hidden_rows, x, layer.attn_norm);
    m_.kernels.gemm(m_.team, thread, layer.qkv, normed, rows_, {Then::store, qkv, qkv_ld_, nullptr, 0, &layer.o});
    mark(thread, Phase::qkv);

    auto item = [&](int, int i) {
      m_.kernels.write_kv(m_.shape, layer, qkv + i * qkv_ld_, b_.positions[i], b_.slot_mapping[i], pages);
    };
    m_.team.share(thread, rows_, item);
    mark(thread, Phase::write_kv);

    m_.kernels.attend(m_.team, thread, m_.shape, layer.window, b_, qkv, qkv_ld_, pages, attended,
                      m_.attend_scratch.as<char>());
    mark(thread, Phase::attend);

    const Operand seen = prepare(thread, layer.o, m_.attended_rows, attended, nullptr, width);
    m_.kernels.gemm(m_.team, thread, layer.o, seen, rows_,
                     {Then::add, x, m_.spec.hidden_size, nullptr, 0, &layer.gate_up});
    mark(thread, Phase::o);
  }

  // What a layer's last product is followed by: the next layer, or the head.
  const pw_weight *after(const pw_layer &layer) const {
    return &layer == &m_.layers.back() ? &m_.spec.lm_head : &(&layer)[1].qkv;
  }

  void mlp(int thread, const pw_layer &layer) {
    float *x = m_.x.as<float>();
    const int activation = m_.spec.activation;
    const Operand normed = prepare(thread, layer.gate_up, m_.hidden_rows, x, layer.mlp_norm);
    const int64_t width = round_up(layer.down.k, 32);
    // What the epilogue rounds is the operand already, unless a part of its padding would be left unwritten.
    const bool direct = layer.down.kind == PW_BF16 && width <= layer.gate_up.n / 2;
    Operand gated = m_.gated_rows.operand(layer.down, 0);
    auto *rounded = static_cast<uint16_t *>(gated.data);
    const Output out = direct ? Output{Then::glu, nullptr, gated.stride, rounded, activation, &layer.down}
                              : Output{Then::glu, m_.gated.as<float>(), width, nullptr, activation, &layer.down};
    m_.kernels.gemm(m_.team, thread, layer.gate_up, normed, rows_, out);
    mark(thread, Phase::gate_up);

    if (!direct) gated = prepare(thread, layer.down, m_.gated_rows, m_.gated.as<float>(), nullptr, width);
    m_.kernels.gemm(m_.team, thread, layer.down, gated, rows_,
                     {Then::add, x, m_.spec.hidden_size, nullptr, 0, after(layer)});
    mark(thread, Phase::down);
  }

  // All rows of `x`, `ld` apart, as what `w` multiplies.
  Operand prepare(int thread, const pw_weight &w, const Rows &rows, const float *x, const float *norm, int64_t ld = 0) {
    if (!ld) ld = m_.spec.hidden_size;
    const bool few = rows_ <= FEW;
    const Operand out = rows.operand(w, few ? thread : 0);
    auto item = [&](int, int block) {
      for (int i = block * BLOCK; i < (block + 1) * BLOCK && i < rows_; i++)
        m_.kernels.prepare(x + i * ld, norm, m_.spec.norm_eps, w.k, out, i);
    };
    if (few)
      item(thread, 0);
    else
      m_.team.share(thread, (rows_ + BLOCK - 1) / BLOCK, item);
    mark(thread, Phase::norm);
    return out;
  }

  void mark(int thread, Phase phase) {
    if (thread == 0) m_.clock.mark(phase);
  }

  Model &m_;
  const pw_batch &b_;
  const int rows_;
  int64_t qkv_ld_;
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
