// Opening a model: what it holds, and memory.
#include "model.h"

#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>

namespace pw {
namespace {

constexpr size_t HUGE_PAGE = 2 << 20;

const Kernels &choose(const char *isa) {
  const Kernels *found = find_kernels(isa);
  if (!found) fail("isa '%s' is none that this host can run: %s", isa, kernel_names());
  return *found;
}

const pw_spec &checked(const pw_spec &spec, const Model *target) {
  check_spec(spec, target);
  return spec;
}

const Model *target_of(const pw_spec &spec, const Model &beside) { return spec.fuse.data ? &beside : nullptr; }

int positive(int threads) {
  if (threads < 1 || threads > 1024) fail("threads %d must be 1 to 1024", threads);
  return threads;
}

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

size_t align(size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

void fail(const char *format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Error(text);
}

Memory::~Memory() {
  if (data_) munmap(data_, bytes_);
}

void Memory::reserve(size_t bytes, const char *what) {
  if (bytes <= bytes_) return;
  if (data_) munmap(data_, bytes_);
  data_ = nullptr, bytes_ = 0;
  const size_t page = bytes < HUGE_PAGE ? 4096 : HUGE_PAGE, whole = (bytes + page - 1) / page * page;
  void *data = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) fail("no memory for the %s: %zu bytes", what, bytes);
  madvise(data, whole, MADV_HUGEPAGE);  // small pages serve as well, more slowly
  data_ = data, bytes_ = whole;
}

// One copy: data, then scales, then sums or offsets.
void Rows::reserve(const pw_weight &w, int rows, int copies) {
  if (rows > rows_) rows_ = rows;
  const size_t kp = round_up(w.k, 32);
  bytes_ = align(rows_ * kp * 2) + 2 * align(rows_ * (kp / PW_GROUP) * sizeof(float));
  memory_.reserve(bytes_ * copies, "rows of a step");
}

Operand Rows::operand(const pw_weight &w, int copy) const {
  const size_t kp = round_up(w.k, 32);
  char *data = memory_.as<char>() + copy * bytes_;
  char *scale = data + align(rows_ * kp * 2), *sums = scale + align(rows_ * (kp / PW_GROUP) * sizeof(float));
  return {w.kind,
          int64_t(kp),
          data,
          reinterpret_cast<float *>(scale),
          reinterpret_cast<int32_t *>(sums),
          reinterpret_cast<float *>(sums)};
}

void Clock::clear() {
  total_ticks_ = 0, total_ns_ = 0;
  for (uint64_t &spent : spent_) spent = 0;
}

void Clock::start() {
  begun_ns_ = now_ns();
  begun_ = last_ = ticks();
  waited_ = team_.waited(0);
}

void Clock::stop() {
  total_ticks_ += ticks() - begun_;
  total_ns_ += now_ns() - begun_ns_;
}

void Clock::seconds(double *out) const {
  const double tick = total_ticks_ ? 1e-9 * double(total_ns_) / double(total_ticks_) : 0;
  for (int i = 0; i < int(Phase::count); i++) out[i] = tick * double(spent_[i]);
}

AttentionShape attention_shape(const pw_spec &s) {
  return {s.num_heads, s.num_kv_heads, s.head_dim, s.rotary_dim, s.kv_kind, s.block_size, s.num_blocks,
          s.norm_eps, s.attention_scale, s.attention_softcap, s.cos, s.sin};
}

// The layout of pages is the same for every instruction set.
int64_t kv_block_bytes(const pw_spec &spec) {
  const int64_t page = kernels_generic.page_bytes(attention_shape(spec));
  return page * spec.num_kv_heads * (spec.block_size / PW_PAGE) * spec.num_layers;
}

Model::Model(const pw_spec &given, int threads, int cpus, const char *isa)
    : Model(checked(given, nullptr), choose(isa), std::make_shared<Team>(positive(threads), threads <= cpus), nullptr) {}

Model::Model(const pw_spec &given, const Model &beside)
    : Model(checked(given, target_of(given, beside)), beside.kernels, beside.shared_team, target_of(given, beside)) {}

Model::Model(const pw_spec &given, const Kernels &kernels, std::shared_ptr<Team> team_, const Model *target)
    : spec(given),
      layers(given.layers, given.layers + given.num_layers),
      taps(given.taps, given.taps + (given.taps ? given.num_taps : 0)),
      target(target),
      kernels(kernels),
      shape(attention_shape(given)),
      shared_team(std::move(team_)) {
  int64_t bytes;
  if (__builtin_mul_overflow(kv_block_bytes(spec), int64_t(spec.num_blocks), &bytes))
    fail("num_blocks %d is more KV than can be addressed", spec.num_blocks);
  kv_layer_bytes = size_t(bytes / spec.num_layers);
  kv.reserve(size_t(bytes), "KV cache");
  if (!taps.empty())
    tapped.reserve(size_t(spec.num_blocks) * size_t(spec.block_size) * taps.size() * size_t(spec.hidden_size) * 2, "taps");
  for (const pw_layer &layer : layers)
    for (const pw_weight *w : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down})
      if (w->order && w->k > widest) widest = round_up(w->k, 16);
  lora_columns = round_up(std::max({spec.intermediate_size, spec.num_heads * spec.head_dim, spec.hidden_size}), 32);
  lora_rows.reserve(size_t(team.size() * lora_columns) * sizeof(uint16_t), "rows for adapters");
  reordered.reserve(size_t(team.size()) * size_t(widest) * sizeof(float), "reordered rows");
}

void Model::set_adapter(int index, const pw_lora *loras) {
  check_adapter(*this, index, loras);
  if (index >= int(adapters.size())) adapters.resize(size_t(index) + 1);
  adapters[size_t(index)].assign(loras, loras ? loras + spec.num_layers * PW_LORAS : nullptr);
}

}  // namespace pw
