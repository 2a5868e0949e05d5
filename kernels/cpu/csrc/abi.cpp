// The C ABI: nothing but calls of Model, with what they throw as −1 and a text.
#include "abi.h"

#include <new>

#include "model.h"

namespace {

thread_local std::string last_error;

template <class F>
int guarded(F &&f) {
  try {
    f();
    return 0;
  } catch (const std::exception &error) {
    last_error = error.what();
    return -1;
  }
}

}  // namespace

extern "C" {

int32_t pw_abi(void) { return PW_ABI; }
const char *pw_error(void) { return last_error.c_str(); }
const char *pw_isas(void) { return pw::kernel_names(); }
const char *pw_phases(void) { return pw::PHASES; }

pw_model *pw_open(const pw_spec *spec, int32_t threads, int32_t cpus, const char *isa) {
  pw_model *model = nullptr;
  guarded([&] { model = new pw_model(*spec, threads, cpus, isa); });
  return model;
}
pw_model *pw_open_beside(const pw_spec *spec, const pw_model *other) {
  pw_model *model = nullptr;
  guarded([&] { model = new pw_model(*spec, *other); });
  return model;
}
void pw_close(pw_model *model) { delete model; }
const char *pw_isa(const pw_model *model) { return model->kernels.name; }

int64_t pw_kv_block_bytes(const pw_spec *spec) {
  int64_t bytes = -1;
  guarded([&] { bytes = pw::kv_block_bytes(*spec); });
  return bytes;
}

void *pw_kv(const pw_model *model) { return model->kv.as<void>(); }

int pw_set_adapter(pw_model *model, int32_t index, const pw_lora *loras) {
  return guarded([&] { model->set_adapter(index, loras); });
}
int pw_forward(pw_model *model, const pw_batch *batch) {
  return guarded([&] { model->forward(*batch); });
}
int pw_sample(pw_model *model, const pw_samples *samples) {
  return guarded([&] { model->sample(*samples); });
}
int pw_step(pw_model *model, const pw_batch *batch, const pw_samples *samples) {
  return guarded([&] {
    model->forward(*batch);
    model->sample(*samples);
  });
}
int pw_logits(pw_model *model, const int64_t *tokens, int32_t count, float *out) {
  return guarded([&] { model->write_logits(tokens, count, out); });
}
int pw_hidden(pw_model *model, const int64_t *tokens, int32_t count, float *out) {
  return guarded([&] { model->write_hidden(tokens, count, out); });
}
int pw_states(pw_model *model, const int64_t *tokens, int32_t count, float *out) {
  return guarded([&] { model->write_states(tokens, count, out); });
}
int pw_score(pw_model *model, const int64_t *tokens, const int64_t *token_ids, const int32_t *num_top, int32_t count,
             int32_t max_top, double *logprobs, int64_t *ranks, int64_t *top_ids, double *top_logprobs) {
  return guarded([&] {
    model->score(tokens, token_ids, num_top, count, max_top, logprobs, ranks, top_ids, top_logprobs);
  });
}

int pw_timings(const pw_model *model, double *out) {
  model->clock.seconds(out);
  return 0;
}

}  // extern "C"
