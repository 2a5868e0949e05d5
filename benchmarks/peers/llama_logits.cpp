// Logits of given tokens by llama.cpp: `llama_logits MODEL.gguf CONTEXT THREADS`, for benchmarks.readers.Program.
//
// Out: int32 size of the vocabulary. In, again and again: int32 start, count, tokens[count]; out: float32 logits
// [count, vocab]. A start of 0 forgets what was read before. KV and attention as llama-server has them by default.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "llama.h"

static const int CHUNK = 512;

static int fail(const char *what) {
  fprintf(stderr, "llama_logits: %s\n", what);
  return 1;
}

static void say_errors(ggml_log_level level, const char *text, void *) {
  if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

int main(int argc, char **argv) {
  if (argc != 4) return fail("MODEL.gguf CONTEXT THREADS");
  llama_log_set(say_errors, nullptr);
  llama_backend_init();
  llama_model *model = llama_model_load_from_file(argv[1], llama_model_default_params());
  if (!model) return fail("the model does not load");
  llama_context_params params = llama_context_default_params();
  params.n_ctx = atoi(argv[2]);
  params.n_batch = params.n_ubatch = CHUNK;
  params.n_threads = params.n_threads_batch = atoi(argv[3]);
  params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
  llama_context *context = llama_init_from_model(model, params);
  if (!context) return fail("no context");
  int32_t vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
  fwrite(&vocab, sizeof vocab, 1, stdout);
  fflush(stdout);

  llama_batch batch = llama_batch_init(CHUNK, 0, 1);
  for (int32_t head[2]; fread(head, sizeof head, 1, stdin) == 1;) {
    int32_t start = head[0], count = head[1];
    if (count < 1 || count > CHUNK || fread(batch.token, 4, count, stdin) != size_t(count)) return fail("no tokens");
    if (!start) llama_memory_clear(llama_get_memory(context), true);
    batch.n_tokens = count;
    for (int i = 0; i < count; i++) {
      batch.pos[i] = start + i;
      batch.n_seq_id[i] = 1;
      batch.seq_id[i][0] = 0;
      batch.logits[i] = 1;
    }
    if (llama_decode(context, batch)) return fail("llama_decode");
    fwrite(llama_get_logits(context), sizeof(float), size_t(count) * vocab, stdout);
    fflush(stdout);
  }
  return 0;
}
