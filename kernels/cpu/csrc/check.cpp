// Whatever would make a step read or write beyond what is there is an error here, with the field and its limit. What
// this costs is a few comparisons a token.
#include "model.h"

namespace pw {
namespace {

typedef long long ll;

void check_range(const char *field, ll value, ll least, ll most) {
  if (value < least || value > most) fail("%s is %lld, and must be %lld to %lld", field, value, least, most);
}

void check_pointer(const char *field, const void *pointer) {
  if (!pointer) fail("%s is null", field);
}

void check_weight(const char *name, int layer, const pw_weight &w, ll n, ll k) {
  char where[64];
  snprintf(where, sizeof where, layer < 0 ? "%s" : "%s of layer %d", name, layer);
  if (w.kind < PW_BF16 || w.kind > PW_W8A16) fail("%s: kind %d is none", where, w.kind);
  if (w.n != n || w.k != k) fail("%s is [%d, %d], and must be [%lld, %lld]", where, w.n, w.k, n, k);
  if (!w.data || reinterpret_cast<uintptr_t>(w.data) % 64) fail("%s: data must be 64-byte aligned", where);
  if ((w.kind == PW_INT8 || w.kind == PW_W8A8) && !w.scale) fail("%s: scale is null", where);
  if ((w.kind == PW_W4A16 || w.kind == PW_W8A16) && (w.group < PW_GROUP || w.group % PW_GROUP))
    fail("%s: group %d is no multiple of %d", where, w.group, PW_GROUP);
  for (ll i = 0; w.order && i < k; i++)
    if (w.order[i] < 0 || w.order[i] >= k) fail("%s: order[%lld] is %d, and there are %lld columns", where, i, w.order[i], k);
}

void check_layer(const pw_spec &s, int index, ll width) {
  const pw_layer &layer = s.layers[index];
  const ll q = ll(s.num_heads) * s.head_dim, kv = ll(s.num_kv_heads) * s.head_dim;
  check_weight("qkv", index, layer.qkv, q + 2 * kv, width);
  check_weight("o", index, layer.o, s.hidden_size, q);
  check_weight("gate_up", index, layer.gate_up, 2 * round_up(s.intermediate_size, PW_PANEL), s.hidden_size);
  check_weight("down", index, layer.down, s.hidden_size, s.intermediate_size);
  check_pointer("attn_norm", layer.attn_norm);
  check_pointer("mlp_norm", layer.mlp_norm);
  check_range("window", layer.window, 0, INT32_MAX);
  if (!layer.cos != !layer.sin) fail("layer %d has cos or sin, and not the other", index);
}

void check_head(const pw_spec &s, const Model *target) {
  if (!target) fail("fuse is of a head, which is opened beside its model");
  const ll taps = ll(target->taps.size());
  if (!taps) fail("fuse is of a head, and the model beside keeps no taps");
  if (target->spec.hidden_size != s.hidden_size)
    fail("hidden_size %d of a head must be its model's, %d", s.hidden_size, target->spec.hidden_size);
  if (target->spec.block_size != s.block_size || target->spec.num_blocks > s.num_blocks)
    fail("a head has blocks of %d tokens and at least %d of them, as its model", target->spec.block_size, target->spec.num_blocks);
  if (s.num_layers != 1) fail("num_layers of a head is %d, and must be 1", s.num_layers);
  check_weight("fuse", -1, s.fuse, s.hidden_size, taps * s.hidden_size);
  check_pointer("embed_norm", s.embed_norm);
  check_pointer("state_norm", s.state_norm);
}

void check_row(const Model &m, const pw_batch &b, int row) {
  const pw_spec &s = m.spec;
  const ll first = b.cu[row], count = b.cu[row + 1] - first, context = b.context_lens[row];
  if (count < 1 || b.cu[row + 1] > b.num_tokens) fail("cu of row %d is %lld … %lld", row, first, first + count);
  if (context < count || context > s.max_model_len)
    fail("context_lens[%d] is %lld, and must be %lld to %d", row, context, count, s.max_model_len);
  const int64_t *table = b.block_tables + row * b.table_stride;
  const ll blocks = (context + s.block_size - 1) / s.block_size;
  if (blocks > b.table_stride) fail("row %d sees %lld blocks, and its table has %lld", row, blocks, ll(b.table_stride));
  for (ll i = 0; i < blocks; i++)
    if (table[i] < 0 || table[i] >= s.num_blocks)
      fail("block_tables[%d, %lld] is %lld, and there are %d blocks", row, i, ll(table[i]), s.num_blocks);
  for (ll i = 0; i < count; i++) {
    const ll at = first + i, position = context - count + i, token = b.token_ids[at];
    const int vocab_size = (m.target ? m.target->spec : s).vocab_size;
    if (token < 0 || token >= vocab_size)
      fail("token_ids[%lld] is %lld, outside of the vocabulary of %d", at, token, vocab_size);
    if (b.positions[at] != position)
      fail("positions[%lld] is %lld, and by its row's length %lld", at, ll(b.positions[at]), position);
    const ll slot = table[position / s.block_size] * s.block_size + position % s.block_size;
    if (b.slot_mapping[at] != slot)
      fail("slot_mapping[%lld] is %lld, and by its row's table %lld", at, ll(b.slot_mapping[at]), slot);
    if (m.target && !b.states && slot >= ll(m.target->spec.num_blocks) * s.block_size)
      fail("slot_mapping[%lld] is %lld, and its model's taps end before", at, slot);
  }
}

void check_edits(const char *field, const int64_t *at, ll count, ll limit) {
  if (count < 0) fail("the number of %s is %lld", field, count);
  if (count) check_pointer(field, at);
  for (ll i = 0; i < count; i++)
    if (at[i] < 0 || at[i] >= limit) fail("%s[%lld] is %lld, and there are %lld logits", field, i, ll(at[i]), limit);
}

}  // namespace

void check_spec(const pw_spec &s, const Model *target) {
  constexpr int MOST = 1 << 24;  // of any size: products of two fit 64 bits by far
  if (s.abi != PW_ABI) fail("abi is %d, and this library's is %d", s.abi, PW_ABI);
  for (auto [field, value] : {std::pair{"vocab_size", s.vocab_size}, {"hidden_size", s.hidden_size},
                              {"intermediate_size", s.intermediate_size}, {"num_layers", s.num_layers},
                              {"num_heads", s.num_heads}, {"num_kv_heads", s.num_kv_heads}, {"head_dim", s.head_dim},
                              {"max_model_len", s.max_model_len}, {"num_blocks", s.num_blocks}})
    check_range(field, value, 1, MOST);
  check_range("rotary_dim", s.rotary_dim, 0, s.head_dim);
  check_range("activation", s.activation, PW_SILU, PW_GELU_TANH);
  check_range("kv_kind", s.kv_kind, PW_KV_BF16, PW_KV_INT8);
  check_range("block_size", s.block_size, PW_PAGE, 1 << 16);
  if (s.block_size % PW_PAGE) fail("block_size %d must be a multiple of %d", s.block_size, PW_PAGE);
  if (s.num_heads % s.num_kv_heads) fail("num_heads %d must be a multiple of num_kv_heads %d", s.num_heads, s.num_kv_heads);
  if (!kernels_generic.attention_fits(attention_shape(s)))
    fail("head_dim %d with rotary_dim %d is not supported: multiples of 16 up to 256, even", s.head_dim, s.rotary_dim);
  check_pointer("cos", s.cos);
  check_pointer("sin", s.sin);
  check_pointer("final_norm", s.final_norm);
  check_pointer("layers", s.layers);
  check_weight("lm_head", -1, s.lm_head, s.vocab_size, s.hidden_size);
  if (s.lm_head.order) fail("lm_head: order must be null");
  if (s.fuse.data) check_head(s, target);
  if (!s.embed && !s.fuse.data && (s.lm_head.kind != PW_BF16 || s.lm_head.scale)) fail("embed is null, and lm_head is not bfloat16");
  for (int i = 0; i < s.num_layers; i++) check_layer(s, i, s.fuse.data ? 2 * ll(s.hidden_size) : s.hidden_size);
  for (int i = 0; s.taps && i < s.num_taps; i++) check_range("taps", s.taps[i], 0, s.num_layers - 1);
}

void check_adapter(const Model &m, int index, const pw_lora *loras) {
  check_range("index", index, 1, PW_MAX_ADAPTERS);
  for (int i = 0; loras && i < m.spec.num_layers * PW_LORAS; i++) {
    const pw_lora &lora = loras[i];
    if (!lora.a) continue;
    if (!lora.b) fail("lora %d of layer %d: b is null", i % PW_LORAS, i / PW_LORAS);
    if (lora.rank < 16 || lora.rank % 16 || lora.rank > 4096)
      fail("lora %d of layer %d: rank %d must be a multiple of 16, at most 4096", i % PW_LORAS, i / PW_LORAS, lora.rank);
  }
}

void check_batch(const Model &m, const pw_batch &b) {
  if (!m.team.alive()) fail("the process forked, and the threads of this model stayed with its parent");
  check_range("num_rows", b.num_rows, 0, 1 << 20);
  check_range("num_tokens", b.num_tokens, b.num_rows, 1 << 20);
  check_pointer("cu", b.cu);
  if (b.cu[0] != 0 || b.cu[b.num_rows] != b.num_tokens)
    fail("cu is from %lld to %lld, and must be from 0 to %d", ll(b.cu[0]), ll(b.cu[b.num_rows]), b.num_tokens);
  for (int row = 0; row < b.num_rows; row++) check_row(m, b, row);
  for (int row = 0; b.adapters && row < b.num_rows; row++) {
    const ll index = b.adapters[row];
    if (index && (index < 0 || index >= ll(m.adapters.size()) || m.adapters[index].empty()))
      fail("adapters[%d] is %lld, and none is there", row, index);
  }
  if (!b.wanted) return;
  check_range("num_wanted", b.num_wanted, 0, b.num_tokens);
  for (ll i = 0; i < b.num_wanted; i++)
    if (b.wanted[i] < (i ? b.wanted[i - 1] + 1 : 0) || b.wanted[i] >= b.num_tokens)
      fail("wanted[%lld] is %lld: they must ascend, and there are %d tokens", i, ll(b.wanted[i]), b.num_tokens);
}

void check_tokens(const Model &m, const int64_t *tokens, int count) {
  if (!m.team.alive()) fail("the process forked, and the threads of this model stayed with its parent");
  for (int i = 0; i < count; i++)
    if (tokens[i] < 0 || tokens[i] >= m.num_tokens)
      fail("tokens[%d] is %lld, and the last forward had %d", i, ll(tokens[i]), m.num_tokens);
    else if (m.row_of(tokens[i]) < 0)
      fail("tokens[%d] is %lld, which the last forward's `wanted` left out", i, ll(tokens[i]));
}

void check_samples(const Model &m, const pw_samples &s) {
  check_range("num", s.num, 0, 1 << 20);
  check_tokens(m, s.tokens, s.num);
  const ll logits = ll(s.num) * m.spec.vocab_size;
  check_edits("bias_at", s.bias_at, s.num_bias, logits);
  check_edits("ban_at", s.ban_at, s.num_bans, logits);
  check_edits("penalty_at", s.penalty_at, s.num_penalties, logits);
  check_range("max_top", s.max_top, 0, m.spec.vocab_size);
  for (int i = 0; i < s.num; i++) {
    if (s.params[i].logprobs > s.max_top)
      fail("params[%d].logprobs is %d, more than max_top, %d", i, s.params[i].logprobs, s.max_top);
    if (s.params[i].logprobs < 0) continue;
    check_pointer("logprobs", s.logprobs);
    check_pointer("ranks", s.ranks);
    if (s.max_top) check_pointer("top_ids", s.top_ids);
    if (s.max_top) check_pointer("top_logprobs", s.top_logprobs);
  }
}

}  // namespace pw
