// A step's forward: one run of the team. Each phase is shared, and done before the next begins: what a thread reads,
// any other may have written.
//
//   embed → per layer: norm → qkv → write_kv → attend → o (+ residual) → norm → gate_up → down (+ residual)
//
// Where what o and down give is normed before it is added, that is a phase of its own.
//
// Each element is made by one thread in one order, so who made it never shows.
#include "model.h"

#include <algorithm>
#include <cstring>

namespace pw {
namespace {

constexpr int FEW = 4;    // rows that every thread prepares for itself: that is quicker than to wait for others
constexpr int BLOCK = 4;  // rows prepared at a time, where they are shared

// bfloat16 bits, to the nearest, and back.
uint16_t rounded(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float widened(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// What a layer's second half is computed for: all tokens, or in the last layer those whose outputs are wanted.
struct Part {
  const pw_batch *batch;
  int rows;
  float *x, *qkv;
  char *scratch;  // attention's plan
  const pw_lora *const *loras;  // [rows] as Addition has them; null: none has an adapter
};

enum Lora { LORA_QKV = 0, LORA_O = 3, LORA_GATE_UP = 4, LORA_DOWN = 6 };  // a layer's, from its first on

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
      : m_(model), b_(batch), wanted_(batch), some_(Wanted::pruned(batch)), width_(model.spec.hidden_size) {
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
    if (m_.target) {
      m_.fuse_rows.reserve(s.fuse, rows, copies);
      m_.fusing.reserve(size_t(rows) * size_t(s.fuse.k) * sizeof(float), "a head's taps");
      m_.joined.reserve(size_t(rows) * 2 * size_t(width_) * sizeof(float), "a head's rows");
    }
    m_.attended_rows.reserve(first.o, rows, copies);
    m_.gated_rows.reserve(first.down, rows, copies);
    find_loras();
    all_ = part(b_, m_.x, m_.qkv, m_.attend_scratch, loras_);
    last_ = some_ ? part(wanted_.batch, m_.last_x, m_.last_qkv, m_.last_scratch, last_loras_) : all_;
    m_.rows.clear();
    if (some_) m_.rows.assign(size_t(rows), -1);
    for (int i = 0; some_ && i < last_.rows; i++) m_.rows[size_t(b_.wanted[i])] = i;
  }

  void operator()(int thread) {
    if (m_.target)
      join(thread);
    else
      embed(thread);
    mark(thread, Phase::embed);
    char *pages = m_.kv.as<char>();
    for (const pw_layer &layer : m_.layers) {
      tap(thread, int32_t(&layer - m_.layers.data()));
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
  void embed(int thread) {
    auto item = [&](int, int i) { m_.kernels.embed(m_.spec, b_.token_ids[i], all_.x + i * width_); };
    m_.team.share(thread, all_.rows, item);
  }

  // Keeps the layer's input, where it is asked for.
  void tap(int thread, int32_t layer) {
    const auto count = int64_t(m_.taps.size());
    for (int64_t t = 0; t < count; t++) {
      if (m_.taps[size_t(t)] != layer) continue;
      auto item = [&](int, int i) {
        uint16_t *to = m_.tapped.as<uint16_t>() + (b_.slot_mapping[i] * count + t) * width_;
        for (int64_t j = 0; j < width_; j++) to[j] = rounded(all_.x[i * width_ + j]);
      };
      m_.team.share(thread, all_.rows, item);
    }
  }

  // A head's rows: states into x; what its layer multiplies into `joined`.
  void join(int thread) {
    const pw_spec &s = m_.spec, &source = s.embed ? s : m_.target->spec;
    if (b_.states) {
      auto copy = [&](int, int i) { memcpy(all_.x + i * width_, b_.states + i * width_, size_t(width_) * sizeof(float)); };
      m_.team.share(thread, all_.rows, copy);
    } else {
      fuse(thread);
    }
    float *joined = m_.joined.as<float>();
    auto item = [&](int, int i) {
      float *first = joined + i * 2 * width_, *second = first + width_;
      m_.kernels.embed(source, b_.token_ids[i], second);
      m_.kernels.normalize(second, s.embed_norm, s.norm_eps, int(width_), first);
      m_.kernels.normalize(all_.x + i * width_, s.state_norm, s.norm_eps, int(width_), second);
    };
    m_.team.share(thread, all_.rows, item);
  }

  void fuse(int thread) {
    const int64_t columns = m_.spec.fuse.k;
    float *fusing = m_.fusing.as<float>();
    auto widen = [&](int, int i) {
      const uint16_t *from = m_.target->tapped.as<uint16_t>() + b_.slot_mapping[i] * columns;
      for (int64_t j = 0; j < columns; j++) fusing[i * columns + j] = widened(from[j]);
    };
    m_.team.share(thread, all_.rows, widen);
    const Operand operand = prepare(thread, m_.spec.fuse, m_.fuse_rows, all_.rows, fusing, nullptr, columns);
    m_.kernels.gemm(m_.team, thread, m_.spec.fuse, operand, all_.rows,
                    {Then::store, all_.x, width_, nullptr, 0, &m_.layers[0].qkv, nullptr});
  }

  // Each token's adapter, if any of them has one.
  void find_loras() {
    if (!b_.adapters) return;
    bool any = false;
    for (int row = 0; row < b_.num_rows; row++) {
      const int index = b_.adapters[row];
      const pw_lora *first = index ? m_.adapters[size_t(index)].data() : nullptr;
      loras_.insert(loras_.end(), size_t(b_.cu[row + 1] - b_.cu[row]), first);
      for (int i = 0; first && i < m_.spec.num_layers * PW_LORAS; i++)
        if (first[i].a) any = true, shrunk_ld_ = std::max(shrunk_ld_, int64_t(first[i].rank));
    }
    if (!any) return loras_.clear();
    for (int64_t i = 0; some_ && i < b_.num_wanted; i++) last_loras_.push_back(loras_[size_t(b_.wanted[i])]);
    m_.shrunk.reserve(size_t(b_.num_tokens) * 3 * size_t(shrunk_ld_) * sizeof(uint16_t), "what adapters make of rows");
  }

  Part part(const pw_batch &batch, Memory &x, Memory &qkv, Memory &scratch, const std::vector<const pw_lora *> &loras) {
    const int rows = batch.num_tokens, threads = m_.team.size();
    x.reserve(size_t(rows) * m_.spec.hidden_size * sizeof(float), "residual");
    qkv.reserve(size_t(rows) * qkv_ld_ * sizeof(float), "queries");
    scratch.reserve(size_t(m_.kernels.attend_bytes(m_.shape, batch, threads)), "attention's plan");
    m_.kernels.attend_plan(m_.shape, batch, threads, scratch.as<char>());
    return {&batch, rows, x.as<float>(), qkv.as<float>(), scratch.as<char>(), loras.empty() ? nullptr : loras.data()};
  }

  // Queries of all tokens, turned; keys and values into their pages.
  void write_kv(int thread, const pw_layer &layer, char *pages) {
    const Operand normed =
        m_.target ? prepare(thread, layer.qkv, m_.hidden_rows, all_.rows, m_.joined.as<float>(), nullptr, 2 * width_)
                  : prepare(thread, layer.qkv, m_.hidden_rows, all_.rows, all_.x, layer.attn_norm);
    Addition addition;
    m_.kernels.gemm(m_.team, thread, layer.qkv, normed, all_.rows,
                    {Then::store, all_.qkv, qkv_ld_, nullptr, 0, &layer.o,
                     shrink(thread, layer, LORA_QKV, 3, all_, {all_.x, m_.spec.hidden_size, layer.attn_norm}, addition)});
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
    Addition addition;
    const Addition *adapted = shrink(thread, layer, LORA_O, 1, part, {attended, layer.o.k}, addition);
    add(thread, layer.o, seen, part, layer.attn_post_norm, &layer.gate_up, Phase::o, adapted);
  }

  // A product onto the residual, normed first where there is a norm. `next` is the product that follows.
  void add(int thread, const pw_weight &w, const Operand &operand, const Part &part, const float *norm,
           const pw_weight *next, Phase phase, const Addition *adapted) {
    const int64_t width = m_.spec.hidden_size;
    float *y = m_.unnormed.as<float>();
    const Output out = norm ? Output{Then::store, y, width, nullptr, 0, next, adapted}
                            : Output{Then::add, part.x, width, nullptr, 0, next, adapted};
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
    auto *halves = static_cast<uint16_t *>(gated.data);
    Addition addition;
    const Addition *adapted =
        shrink(thread, layer, LORA_GATE_UP, 2, part, {part.x, m_.spec.hidden_size, layer.mlp_norm}, addition);
    const Output out = direct ? Output{Then::glu, nullptr, gated.stride, halves, activation, &layer.down, adapted}
                              : Output{Then::glu, m_.gated.as<float>(), width, nullptr, activation, &layer.down, adapted};
    m_.kernels.gemm(m_.team, thread, layer.gate_up, normed, part.rows, out);
    mark(thread, Phase::gate_up);

    if (!direct) gated = prepare(thread, layer.down, m_.gated_rows, part.rows, m_.gated.as<float>(), nullptr, width);
    const Source source = direct ? Source{nullptr, gated.stride, nullptr, halves} : Source{m_.gated.as<float>(), width};
    adapted = shrink(thread, layer, LORA_DOWN, 1, part, source, addition);
    add(thread, layer.down, gated, part, layer.mlp_post_norm, after(layer), Phase::down, adapted);
  }

  bool few() const { return b_.num_tokens <= FEW; }

  // Rows of x, normed where there is a norm; or as bfloat16 already.
  struct Source {
    const float *x;
    int64_t ld;
    const float *norm = nullptr;
    const uint16_t *rounded = nullptr;
  };

  // What the rows' adapters will add to a product of theirs, once it is expanded; null where no row has one.
  const Addition *shrink(int thread, const pw_layer &layer, Lora first, int sections, const Part &part,
                         const Source &from, Addition &to) {
    if (!part.loras) return nullptr;
    const pw_spec &s = m_.spec;
    const int32_t q = s.num_heads * s.head_dim, kv = s.num_kv_heads * s.head_dim;
    const int k = first == LORA_O ? layer.o.k : first == LORA_DOWN ? layer.down.k : s.hidden_size;
    auto *shrunk = m_.shrunk.as<uint16_t>();
    to = {part.loras, int(&layer - m_.layers.data()) * PW_LORAS + first, sections, {0, q, q + kv}, shrunk, shrunk_ld_};
    auto item = [&](int t, int i) {
      if (!part.loras[i]) return;
      const uint16_t *row = from.rounded + i * from.ld;
      if (from.x) {
        const int64_t kp = round_up(k, 32);
        const Operand mine{PW_BF16, kp, m_.lora_rows.as<uint16_t>() + t * m_.lora_columns, nullptr, nullptr, nullptr};
        m_.kernels.prepare(from.x + i * from.ld, from.norm, s.norm_eps, k, mine, 0);
        row = static_cast<const uint16_t *>(mine.data);
      }
      m_.kernels.shrink(row, k, part.loras[i] + to.offset, sections, shrunk + i * sections * shrunk_ld_, shrunk_ld_);
    };
    m_.team.share(thread, part.rows, item);
    return &to;
  }

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
  const int64_t width_;
  int64_t qkv_ld_, shrunk_ld_ = 0;
  std::vector<const pw_lora *> loras_, last_loras_;  // empty: none
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
