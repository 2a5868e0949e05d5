// Sizes and offsets of the structs of abi.h, as the compiler has them.
#include <cstddef>
#include <string>

#include "abi.h"

extern "C" __attribute__((visibility("default"))) const char *pw_test_layout() {
  static const std::string text = [] {
    std::string lines;
    const auto tell = [&](const char *name, size_t value) {
      lines += std::string(name) + "=" + std::to_string(value) + "\n";
    };
#define SIZE(name, type) tell(#name, sizeof(type))
#define AT(name, type, field) tell(#name "." #field, offsetof(type, field))
    SIZE(Weight, pw_weight);
    AT(Weight, pw_weight, kind);
    AT(Weight, pw_weight, n);
    AT(Weight, pw_weight, k);
    AT(Weight, pw_weight, data);
    AT(Weight, pw_weight, scale);
    AT(Weight, pw_weight, bias);
    AT(Weight, pw_weight, group);
    AT(Weight, pw_weight, order);
    SIZE(Layer, pw_layer);
    AT(Layer, pw_layer, qkv);
    AT(Layer, pw_layer, o);
    AT(Layer, pw_layer, gate_up);
    AT(Layer, pw_layer, down);
    AT(Layer, pw_layer, attn_norm);
    AT(Layer, pw_layer, mlp_norm);
    AT(Layer, pw_layer, q_norm);
    AT(Layer, pw_layer, k_norm);
    AT(Layer, pw_layer, window);
    AT(Layer, pw_layer, attn_post_norm);
    AT(Layer, pw_layer, mlp_post_norm);
    AT(Layer, pw_layer, cos);
    AT(Layer, pw_layer, sin);
    SIZE(Spec, pw_spec);
    AT(Spec, pw_spec, abi);
    AT(Spec, pw_spec, vocab_size);
    AT(Spec, pw_spec, hidden_size);
    AT(Spec, pw_spec, intermediate_size);
    AT(Spec, pw_spec, num_layers);
    AT(Spec, pw_spec, num_heads);
    AT(Spec, pw_spec, num_kv_heads);
    AT(Spec, pw_spec, head_dim);
    AT(Spec, pw_spec, rotary_dim);
    AT(Spec, pw_spec, max_model_len);
    AT(Spec, pw_spec, activation);
    AT(Spec, pw_spec, kv_kind);
    AT(Spec, pw_spec, block_size);
    AT(Spec, pw_spec, num_blocks);
    AT(Spec, pw_spec, norm_eps);
    AT(Spec, pw_spec, attention_scale);
    AT(Spec, pw_spec, attention_softcap);
    AT(Spec, pw_spec, logit_softcap);
    AT(Spec, pw_spec, embedding_scale);
    AT(Spec, pw_spec, cos);
    AT(Spec, pw_spec, sin);
    AT(Spec, pw_spec, embed);
    AT(Spec, pw_spec, final_norm);
    AT(Spec, pw_spec, lm_head);
    AT(Spec, pw_spec, layers);
    AT(Spec, pw_spec, taps);
    AT(Spec, pw_spec, num_taps);
    AT(Spec, pw_spec, fuse);
    AT(Spec, pw_spec, embed_norm);
    AT(Spec, pw_spec, state_norm);
    SIZE(Batch, pw_batch);
    AT(Batch, pw_batch, num_rows);
    AT(Batch, pw_batch, num_tokens);
    AT(Batch, pw_batch, cu);
    AT(Batch, pw_batch, context_lens);
    AT(Batch, pw_batch, token_ids);
    AT(Batch, pw_batch, positions);
    AT(Batch, pw_batch, slot_mapping);
    AT(Batch, pw_batch, block_tables);
    AT(Batch, pw_batch, table_stride);
    AT(Batch, pw_batch, adapters);
    AT(Batch, pw_batch, wanted);
    AT(Batch, pw_batch, num_wanted);
    AT(Batch, pw_batch, states);
    SIZE(Samples, pw_samples);
    AT(Samples, pw_samples, num);
    AT(Samples, pw_samples, tokens);
    AT(Samples, pw_samples, params);
    AT(Samples, pw_samples, num_bias);
    AT(Samples, pw_samples, num_bans);
    AT(Samples, pw_samples, num_penalties);
    AT(Samples, pw_samples, bias_at);
    AT(Samples, pw_samples, bias);
    AT(Samples, pw_samples, ban_at);
    AT(Samples, pw_samples, penalty_at);
    AT(Samples, pw_samples, penalty_counts);
    AT(Samples, pw_samples, mask_rows);
    AT(Samples, pw_samples, bitmask);
    AT(Samples, pw_samples, max_top);
    AT(Samples, pw_samples, token_ids);
    AT(Samples, pw_samples, logprobs);
    AT(Samples, pw_samples, ranks);
    AT(Samples, pw_samples, top_ids);
    AT(Samples, pw_samples, top_logprobs);
    SIZE(Params, pw_params);
    AT(Params, pw_params, temperature);
    AT(Params, pw_params, min_p);
    AT(Params, pw_params, repetition);
    AT(Params, pw_params, presence);
    AT(Params, pw_params, frequency);
    AT(Params, pw_params, logprobs);
    AT(Params, pw_params, top_k);
    AT(Params, pw_params, top_p);
    AT(Params, pw_params, seed);
    AT(Params, pw_params, position);
    return lines;
  }();
  return text.c_str();
}
