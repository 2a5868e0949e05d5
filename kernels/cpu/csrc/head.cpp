// Outputs of a forward: final norm and head of the wanted tokens alone, then sampling, scores, or the logits as they are.
#include "model.h"

#include <algorithm>
#include <cstring>

namespace pw {
namespace {

constexpr float GREEDY_BELOW = 1e-5f;  // as worker_svc.sampler has it
constexpr float LIMIT = 3e33f;         // logits beyond are no numbers to it
constexpr int64_t LOGITS = 4 << 20;    // of all rows at once
constexpr int MOST_ROWS = 64, LEAST_ROWS = 8;

class Head {
 public:
  explicit Head(Model &model) : m_(model), ld_(round_up(m_.spec.vocab_size, PW_PANEL)) {
    const int64_t fit = LOGITS / ld_;
    at_once_ = int(fit > MOST_ROWS ? MOST_ROWS : fit < LEAST_ROWS ? LEAST_ROWS : fit);
  }

  int at_once() const { return at_once_; }  // rows of logits

  void reserve_logits(int count) {
    const int rows = count < at_once_ ? count : at_once_;
    m_.wanted_rows.reserve(m_.spec.lm_head, rows, 1);
    m_.logits.reserve(size_t(rows) * ld_ * sizeof(float), "logits");
    m_.sample_scratch.reserve(size_t(scratch_bytes()) * m_.team.size(), "sampler");
  }

  void reserve_best(int count) {
    m_.wanted_rows.reserve(m_.spec.lm_head, count, 1);
    m_.best.reserve(size_t(m_.team.size()) * best_stride(count) * sizeof(Best), "greatest logits");
  }

  // By every thread: each(thread, i, logits of tokens[i] [vocab], scratch) for each i, the logits the callee's alone.
  template <class Each>
  void logits(int thread, const std::vector<int64_t> &tokens, Each &each) {
    const int count = int(tokens.size());
    const pw_spec &s = m_.spec;
    for (int first = 0; first < count; first += at_once_) {
      const int rows = count - first < at_once_ ? count - first : at_once_;
      const Operand normed = prepare(thread, tokens.data() + first, rows);
      m_.kernels.gemm(m_.team, thread, s.lm_head, normed, rows, {Then::store, m_.logits.as<float>(), ld_, nullptr, 0});
      mark(thread, Phase::head);
      auto item = [&](int, int i) {
        float *row = m_.logits.as<float>() + i * ld_;
        if (s.logit_softcap > 0) m_.kernels.soften(row, s.vocab_size, s.logit_softcap);
        each(first + i, row, m_.sample_scratch.as<char>() + thread * scratch_bytes());
      };
      m_.team.share(thread, rows, item);
      mark(thread, Phase::sample);
    }
  }

  // By every thread: the greatest logits of the tokens, to be read by best() after the run.
  void greatest(int thread, const std::vector<int64_t> &tokens) {
    const int rows = int(tokens.size());
    if (!rows) return;
    const Operand normed = prepare(thread, tokens.data(), rows);
    Best *best = m_.best.as<Best>() + thread * best_stride(rows);
    m_.kernels.gemm_argmax(m_.team, thread, m_.spec.lm_head, normed, rows, m_.spec.logit_softcap, best);
    mark(thread, Phase::head);
  }

  // Of the i-th of `rows` tokens: −1 where its logits are not numbers.
  int64_t best(int i, int rows) const {
    Best top{-__builtin_inff(), -1};
    for (int thread = 0; thread < m_.team.size(); thread++) {
      const Best other = m_.best.as<Best>()[thread * best_stride(rows) + i];
      if (other.index < 0) continue;
      if (top.index < 0 || other.value > top.value || (other.value == top.value && other.index < top.index)) top = other;
    }
    return __builtin_fabsf(top.value) <= LIMIT ? top.index : -1;
  }

 private:
  int64_t scratch_bytes() const { return (m_.kernels.sampling_scratch(m_.spec.vocab_size) + 63) / 64 * 64; }
  static int64_t best_stride(int rows) { return round_up(rows, 8); }  // a cache line is one thread's alone

  Operand prepare(int thread, const int64_t *tokens, int rows) {
    const pw_spec &s = m_.spec;
    const Operand out = m_.wanted_rows.operand(s.lm_head, 0);
    auto item = [&](int, int i) {
      m_.kernels.prepare(m_.residual(tokens[i]), s.final_norm, s.norm_eps, s.hidden_size, out, i);
    };
    m_.team.share(thread, rows, item);
    mark(thread, Phase::norm);
    return out;
  }

  void mark(int thread, Phase phase) {
    if (thread == 0) m_.clock.mark(phase);
  }

  Model &m_;
  const int64_t ld_;
  int at_once_;
};

// Outputs that are their greatest logit and nothing else.
std::vector<bool> plain_outputs(const pw_samples &s, int vocab) {
  std::vector<bool> plain(s.num);
  for (int i = 0; i < s.num; i++)
    plain[i] = s.params[i].temperature < GREEDY_BELOW && s.params[i].logprobs < 0 && !(s.mask_rows && s.mask_rows[i] >= 0);
  for (int64_t i = 0; i < s.num_bias; i++) plain[s.bias_at[i] / vocab] = false;
  for (int64_t i = 0; i < s.num_bans; i++) plain[s.ban_at[i] / vocab] = false;
  for (int64_t i = 0; i < s.num_penalties; i++) plain[s.penalty_at[i] / vocab] = false;
  return plain;
}

}  // namespace

void Model::sample(const pw_samples &samples) {
  check_samples(*this, samples);
  if (!samples.num) return;
  const std::vector<bool> plain = plain_outputs(samples, spec.vocab_size);
  Head head(*this);
  // A second pass over the head's weights costs more than a few rows of logits.
  const int num_plain = int(std::count(plain.begin(), plain.end(), true));
  const bool fuse = num_plain == samples.num || samples.num > head.at_once();
  std::vector<int> fused, others;
  std::vector<int64_t> fused_tokens, other_tokens;
  for (int i = 0; i < samples.num; i++) {
    (plain[i] && fuse ? fused : others).push_back(i);
    (plain[i] && fuse ? fused_tokens : other_tokens).push_back(samples.tokens[i]);
  }
  head.reserve_best(int(fused.size()));
  head.reserve_logits(int(others.size()));
  clock.start();
  auto each = [&](int i, float *logits, char *scratch) {  // what it cannot sample it leaves negative
    kernels.sample(logits, spec.vocab_size, samples, others[i], scratch);
  };
  auto body = [&](int thread) {
    head.greatest(thread, fused_tokens);
    head.logits(thread, other_tokens, each);
  };
  team.run(body);
  clock.stop();
  for (int i = 0; i < int(fused.size()); i++) samples.token_ids[fused[i]] = head.best(i, int(fused.size()));
  for (int i = 0; i < samples.num; i++)
    if (samples.token_ids[i] < 0)
      fail("output %d: %s", i, samples.token_ids[i] == -2 ? "no token is allowed" : "the model's logits are not numbers");
}

void Model::write_logits(const int64_t *tokens, int count, float *out) {
  check_tokens(*this, tokens, count);
  Head head(*this);
  head.reserve_logits(count);
  const std::vector<int64_t> wanted(tokens, tokens + count);
  auto each = [&](int i, const float *logits, char *) {
    memcpy(out + int64_t(i) * spec.vocab_size, logits, size_t(spec.vocab_size) * sizeof(float));
  };
  auto body = [&](int thread) { head.logits(thread, wanted, each); };
  clock.start();
  team.run(body);
  clock.stop();
}

void Model::write_states(const int64_t *tokens, int count, float *out) {
  check_tokens(*this, tokens, count);
  for (int i = 0; i < count; i++)
    memcpy(out + int64_t(i) * spec.hidden_size, residual(tokens[i]), size_t(spec.hidden_size) * sizeof(float));
}

void Model::write_hidden(const int64_t *tokens, int count, float *out) {
  check_tokens(*this, tokens, count);
  const int64_t width = spec.hidden_size;
  auto item = [&](int, int i) {
    kernels.normalize(residual(tokens[i]), spec.final_norm, spec.norm_eps, int(width), out + i * width);
  };
  auto body = [&](int thread) { team.share(thread, count, item); };
  team.run(body);
}

void Model::score(const int64_t *tokens, const int64_t *token_ids, const int32_t *num_top, int count, int max_top,
                  double *logprobs, int64_t *ranks, int64_t *top_ids, double *top_logprobs) {
  check_tokens(*this, tokens, count);
  for (int i = 0; i < count; i++) {
    if (token_ids[i] < 0 || token_ids[i] >= spec.vocab_size)
      fail("token_ids[%d] is %lld, outside of the vocabulary of %d", i, (long long)token_ids[i], spec.vocab_size);
    if (num_top[i] > max_top) fail("num_top[%d] is %d, more than max_top, %d", i, num_top[i], max_top);
  }
  Head head(*this);
  head.reserve_logits(count);
  const std::vector<int64_t> wanted(tokens, tokens + count);
  auto each = [&](int i, const float *logits, char *scratch) {
    kernels.score(logits, spec.vocab_size, token_ids[i], num_top[i], max_top, logprobs + i, ranks + i,
                  top_ids + int64_t(i) * max_top, top_logprobs + int64_t(i) * max_top, scratch);
  };
  auto body = [&](int thread) { head.logits(thread, wanted, each); };
  clock.start();
  team.run(body);
  clock.stop();
  for (int i = 0; i < count; i++)
    if (ranks[i] < 0) fail("token %lld: the model's logits are not numbers", (long long)tokens[i]);
}

}  // namespace pw
