#include "program.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "pack.h"

namespace gqa {

namespace {

constexpr int kGatedColumns = 1024;        // columns of one gated-activation item
constexpr size_t kInputBlock = 768 << 10;  // bytes of prepared activations that panels are multiplied with in turn
constexpr int kMinBlockRows = 48;          // but at least this many rows, so that weights are not read too often
constexpr int kItemsPerThread = 8;         // pieces of a linear layer per thread, for balance

using Clock = std::chrono::steady_clock;

size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

bool same_window(const AttentionParams& a, const AttentionParams& b) {
  return a.num_heads == b.num_heads && a.num_kv_heads == b.num_kv_heads && a.head_dim == b.head_dim &&
         a.window == b.window;
}

bool splits_input(const Kernels& kernels, const PackedWeight& w) {
  return kernels.splits && w.format == WeightFormat::BF16;
}

// Bytes of one prepared row, without what quantization adds.
size_t input_bytes(const Kernels& kernels, const PackedWeight& w) {
  if (w.quantized()) return size_t(w.k_padded);
  return splits_input(kernels, w) ? size_t(w.k_padded) * 6 : size_t(w.k) * 4;
}

// Bytes of the prepared activations of `rows` rows, and where their parts begin.
struct InputLayout {
  size_t scale, sum, outlier_count, outliers, size;
  InputLayout(const Kernels& kernels, const PackedWeight& w, int rows) {
    if (!w.quantized()) {
      scale = sum = outlier_count = outliers = size = size_t(rows) * input_bytes(kernels, w);
      return;
    }
    scale = round_up(size_t(rows) * w.k_padded, 64);
    sum = scale + round_up(size_t(rows) * w.num_groups() * 4, 64);
    outlier_count = sum + round_up(size_t(rows) * w.num_groups() * 4, 64);
    outliers = outlier_count + round_up(size_t(rows) * 4, 64);
    size = outliers + round_up(size_t(rows) * outlier_capacity(w.k) * sizeof(Outlier), 64);
  }
};

KVLayer describe_layer(KVFormat format, int num_kv_heads, int head_dim, int block_size) {
  KVLayer layer{};
  layer.format = format;
  layer.num_kv_heads = num_kv_heads;
  layer.head_dim = head_dim;
  layer.dim = int(round_up(head_dim, 16));
  layer.block_size = block_size;
  return layer;
}

}  // namespace

bool same_input(const PackedWeight& a, const PackedWeight& b) {
  auto is_bf16 = [](const PackedWeight& w) { return w.format == WeightFormat::BF16; };  // AMX splits its inputs
  const bool same_kind = a.quantized() == b.quantized() && is_bf16(a) == is_bf16(b);
  return a.k == b.k && same_kind && (!a.quantized() || a.group == b.group);
}

// --- the cache ---------------------------------------------------------------------------------------------

size_t KVCache::block_bytes(KVFormat format, int num_kv_heads, int head_dim, int block_size) {
  KVLayer layer = describe_layer(format, num_kv_heads, head_dim, block_size);
  size_t scales = format == KVFormat::I8 ? size_t(block_size) * 4 : 0;
  return 2 * num_kv_heads * (layer.head_bytes() + scales);
}

KVCache::KVCache(int num_layers, int num_blocks, KVFormat format, int num_kv_heads, int head_dim, int block_size)
    : num_blocks_(num_blocks),
      memory_(num_layers * (num_blocks * block_bytes(format, num_kv_heads, head_dim, block_size) + 4 * 64), true) {
  uint8_t* next = memory_.data();
  auto take = [&](size_t bytes) {
    uint8_t* piece = next;
    next += round_up(bytes, 64);
    return piece;
  };
  for (int i = 0; i < num_layers; i++) {
    KVLayer layer = describe_layer(format, num_kv_heads, head_dim, block_size);
    size_t heads = size_t(num_blocks) * num_kv_heads;
    layer.k = take(heads * layer.head_bytes());
    layer.v = take(heads * layer.head_bytes());
    if (format == KVFormat::I8) {
      layer.k_scale = reinterpret_cast<float*>(take(heads * block_size * 4));
      layer.v_scale = reinterpret_cast<float*>(take(heads * block_size * 4));
    }
    layers_.push_back(layer);
  }
}

// --- recording ---------------------------------------------------------------------------------------------

void Program::Free::operator()(float* p) const { std::free(p); }

Program::Buffer Program::allocate(size_t floats) {
  // Kernels may read, and never use, a vector beyond the end.
  void* p = std::aligned_alloc(64, round_up(floats * 4 + 64, 64));
  if (!p) throw std::bad_alloc();
  return Buffer(static_cast<float*>(p));
}

Program::Program(const Kernels& kernels, int threads) : kernels_(kernels), team_(threads) {}

Value Program::add_value(int width) {
  widths_.push_back(width);
  capacity_ = 0;
  return int(widths_.size()) - 1;
}

int Program::add_rotary(std::vector<float> inv_freq, float scale) {
  rotaries_.push_back({std::move(inv_freq), scale, {}, {}});
  capacity_ = 0;
  return int(rotaries_.size()) - 1;
}

// Make the buffers hold `rows` rows.
void Program::reserve(int rows) {
  if (rows <= capacity_) return;
  rows = std::min(kMaxRows, std::max(rows, 2 * capacity_));
  capacity_ = 0;  // until all of it is there: an allocation may fail
  // Kernels may read, and never use, a vector beyond the end.
  auto bytes = [&](int width) { return round_up(size_t(rows) * width * 4, 64) + 64; };
  size_t size = 0;
  for (int width : widths_) size += bytes(width);
  memory_ = std::make_unique<Mapping>(size, size >= kHugePage);
  buffers_.clear();
  size = 0;
  for (int width : widths_) {
    buffers_.push_back(reinterpret_cast<float*>(memory_->data() + size));
    size += bytes(width);
  }
  for (Rotary& rotary : rotaries_) {
    rotary.cos.resize(rows * rotary.inv_freq.size());
    rotary.sin.resize(rows * rotary.inv_freq.size());
  }
  for (const Op& op : ops_)
    if (const LinearOp* linear = std::get_if<LinearOp>(&op)) {
      for (const WeightPtr& part : linear->parts) reserve_input(part->packed, rows);
    } else if (const GatedLinearOp* gated = std::get_if<GatedLinearOp>(&op)) {
      reserve_input(gated->gate->packed, rows);
    }
  capacity_ = rows;
}

// The tail: row operations after the last one that needs tokens. There is none where it does not compute `result`.
void Program::find_tail(Value result) {
  auto needs_tokens = [](const Op& op) {
    return std::holds_alternative<EmbedOp>(op) || std::holds_alternative<RotateOp>(op) ||
           std::holds_alternative<AttendOp>(op);
  };
  tail_ = ops_.size();
  while (tail_ > 0 && !needs_tokens(ops_[tail_ - 1])) tail_--;
  std::vector<Value> read, written;
  auto add = [](std::vector<Value>& values, Value v) {
    if (std::find(values.begin(), values.end(), v) == values.end()) values.push_back(v);
  };
  auto is_written = [&](Value v) { return std::find(written.begin(), written.end(), v) != written.end(); };
  for (size_t i = tail_; i < ops_.size(); i++) {
    std::visit(
        [&](const auto& op) {
          using T = std::decay_t<decltype(op)>;
          if constexpr (requires { op.x; })
            if (!is_written(op.x)) add(read, op.x);
          if constexpr (std::is_same_v<T, AddNormOp>)
            if (!is_written(op.residual)) add(read, op.residual);
          add(written, op.out);
        },
        ops_[i]);
  }
  if (!is_written(result)) tail_ = ops_.size();  // all rows of it are there already
  tail_inputs_ = std::move(read);
}

// Make the buffers of prepared activations large enough for `rows` rows of inputs of `weight`.
void Program::reserve_input(const PackedWeight& weight, int rows) {
  size_t shared = InputLayout(kernels_, weight, rows).size, single = InputLayout(kernels_, weight, 1).size;
  if (shared > shared_input_bytes_) {
    shared_input_ = allocate(shared / 4);
    shared_input_bytes_ = shared;
  }
  if (single > single_input_bytes_) {
    std::vector<Buffer> inputs;
    for (int i = 0; i < team_.threads(); i++) inputs.push_back(allocate(single / 4));
    single_inputs_ = std::move(inputs);
    single_input_bytes_ = single;
  }
}

// --- a step ------------------------------------------------------------------------------------------------

// Programs are not for two threads at once: what one reserves, the other would compute in.
class Program::Busy {
 public:
  explicit Busy(std::atomic<bool>& flag) : flag_(flag) {
    if (flag_.exchange(true)) throw std::logic_error("this program is running already");
  }
  ~Busy() { flag_ = false; }

 private:
  std::atomic<bool>& flag_;
};

struct Program::Rows {
  int count;
  const int64_t* token_ids;
  const int64_t* positions;
  const int64_t* slots;
  std::vector<int32_t> query_start, context_lens, block_tables;
  std::vector<int> wanted;  // rows whose results are wanted, ascending
  AttentionBatch attention;
};

// The tokens [begin, end) of a step, as a step of their own.
Program::Rows Program::cut(const Step& step, int begin, int end) const {
  Rows rows{end - begin,
            step.token_ids.data() + begin,
            step.positions.data() + begin,
            step.slots.data() + begin,
            {0},
            {},
            {},
            {},
            {}};
  for (int row : step.result_rows)
    if (row >= begin && row < end) rows.wanted.push_back(row - begin);
  int start = 0;
  for (size_t b = 0; b < step.query_lens.size(); b++) {
    int stop = start + step.query_lens[b];
    int from = std::max(start, begin), to = std::min(stop, end);
    if (from < to) {
      rows.query_start.push_back(to - begin);
      rows.context_lens.push_back(step.context_lens[b] - (stop - to));
      const int32_t* table = step.block_tables.data() + b * step.max_blocks;
      rows.block_tables.insert(rows.block_tables.end(), table, table + step.max_blocks);
    }
    start = stop;
  }
  rows.attention = {int(rows.context_lens.size()), step.max_blocks, rows.query_start.data(),
                    rows.context_lens.data(), rows.block_tables.data()};
  return rows;
}

void Program::plan_attention_of(const Rows& rows) {
  plans_.clear();
  for (const Op& op : ops_) {
    const AttendOp* attend = std::get_if<AttendOp>(&op);
    if (!attend) continue;
    const AttentionParams& params = attend->params;
    auto same = [&](const auto& known) { return same_window(known.first, params); };
    if (std::any_of(plans_.begin(), plans_.end(), same)) continue;
    plans_.emplace_back(params, plan_attention(params, rows.attention, team_.threads()));
    size_t partials = plans_.back().second.num_partials * partial_floats(params);
    if (partials > partials_size_) {
      partials_ = allocate(partials + partials / 2);
      partials_size_ = partials + partials / 2;
    }
    if (scratch_floats(params) > scratch_size_) {
      scratch_size_ = scratch_floats(params);
      scratch_.clear();
    }
  }
  while (int(scratch_.size()) < team_.threads()) scratch_.push_back(allocate(scratch_size_));
}

void Program::run(const Step& step, const KVCache& cache, Value result, float* out) {
  Busy busy(busy_);
  const int width = widths_.at(result), num_tokens = int(step.token_ids.size());
  for (const Op& op : ops_) {
    const EmbedOp* embed = std::get_if<EmbedOp>(&op);
    auto known = [&](int64_t token) { return token >= 0 && token < embed->vocabulary; };
    if (embed && !std::all_of(step.token_ids.begin(), step.token_ids.end(), known))
      throw std::invalid_argument("a token id is not in the vocabulary");
  }
  find_tail(result);
  for (int begin = 0; begin < num_tokens; begin += kMaxRows) {
    int end = std::min(begin + kMaxRows, num_tokens);
    reserve(end - begin);
    Rows part = cut(step, begin, end);
    plan_attention_of(part);
    team_.run([&](int thread) { execute(part, cache, thread); });
    for (size_t i = 0; i < part.wanted.size(); i++, out += width) {
      size_t row = tail_ < ops_.size() ? i : part.wanted[i];
      std::memcpy(out, value(result) + row * width, size_t(width) * 4);
    }
  }
}

void Program::execute(const Rows& rows, const KVCache& cache, int thread) {
  compute_angles(rows, thread);
  const bool counted = thread == 0 && !seconds_.empty();
  Rows wanted{};
  wanted.count = int(rows.wanted.size());
  for (size_t i = 0; i < ops_.size(); i++) {
    if (i >= tail_ && wanted.count == 0) return;
    auto start = counted ? Clock::now() : Clock::time_point();
    if (i == tail_ && wanted.count < rows.count) gather_wanted(rows, thread);
    execute(ops_[i], i >= tail_ ? wanted : rows, cache, thread);
    if (counted) seconds_[i] += std::chrono::duration<double>(Clock::now() - start).count();
  }
}

void Program::execute(const Op& op, const Rows& rows, const KVCache& cache, int thread) {
  std::visit(
      [&](const auto& one) {
        using T = std::decay_t<decltype(one)>;
        if constexpr (std::is_same_v<T, RotateOp> || std::is_same_v<T, AttendOp>)
          execute(one, rows, cache, thread);
        else
          execute(one, rows, thread);
      },
      op);
}

// The wanted rows of what the tail reads move to the front.
void Program::gather_wanted(const Rows& rows, int thread) {
  team_.parallel_for(thread, int(tail_inputs_.size()), [&](int i) {
    const size_t width = widths_[tail_inputs_[i]];
    float* first = value(tail_inputs_[i]);
    for (size_t to = 0; to < rows.wanted.size(); to++)
      std::memmove(first + to * width, first + rows.wanted[to] * width, width * 4);
  });
}

std::vector<std::pair<std::string, double>> Program::profile() {
  static const char* const names[] = {"embed", "norm", "add and norm", "linear", "gated linear", "gated",
                                      "rotate and write", "attend", "call"};
  std::vector<std::pair<std::string, double>> result;
  for (size_t i = 0; i < seconds_.size(); i++) {
    std::string name = names[ops_[i].index()];
    if (const LinearOp* linear = std::get_if<LinearOp>(&ops_[i]))
      name += " " + std::to_string(linear->parts[0]->packed.k) + " -> " + std::to_string(widths_[linear->out]);
    if (const GatedLinearOp* gated = std::get_if<GatedLinearOp>(&ops_[i]))
      name += " " + std::to_string(gated->gate->packed.k) + " -> 2 x " + std::to_string(widths_[gated->out]);
    auto same = [&](const auto& known) { return known.first == name; };
    auto known = std::find_if(result.begin(), result.end(), same);
    if (known == result.end()) known = result.insert(result.end(), {name, 0.0});
    known->second += seconds_[i];
  }
  seconds_.assign(ops_.size(), 0.0);
  return result;
}

// As transformers: the angle is a float32 product; its cosine and sine are then rounded once.
void Program::compute_angles(const Rows& rows, int thread) {
  for (Rotary& rotary : rotaries_) {
    size_t n = rotary.inv_freq.size();
    team_.parallel_for(thread, rows.count, [&](int row) {
      for (size_t i = 0; i < n; i++) {
        float angle = float(rows.positions[row]) * rotary.inv_freq[i];
        rotary.cos[row * n + i] = float(std::cos(double(angle))) * rotary.scale;
        rotary.sin[row * n + i] = float(std::sin(double(angle))) * rotary.scale;
      }
    });
  }
}

void Program::execute(const EmbedOp& op, const Rows& rows, int thread) {
  const PackedWeight& table = op.table->packed;
  team_.parallel_for(thread, rows.count, [&](int row) {
    float* out = value(op.out) + size_t(row) * table.k;
    const int64_t entry = rows.token_ids[row] - op.first;
    if (entry < 0 || entry >= table.n) {
      std::fill_n(out, table.k, 0.0f);
      return;
    }
    unpack_row(table, int(entry), out);
    if (op.scale != 1.0f) kernels_.scale(out, table.k, op.scale);
  });
}

void Program::execute(const CallOp& op, const Rows& rows, int thread) {
  if (thread == 0) op.function(value(op.x), rows.count);
  team_.barrier(thread);
}

void Program::execute(const NormOp& op, const Rows& rows, int thread) {
  int n = int(op.weight->size());
  team_.parallel_for(thread, rows.count, [&](int row) {
    kernels_.rms_norm(value(op.x) + size_t(row) * n, op.weight->data(), value(op.out) + size_t(row) * n, n, op.eps);
  });
}

void Program::execute(const AddNormOp& op, const Rows& rows, int thread) {
  int n = widths_[op.residual];
  team_.parallel_for(thread, rows.count, [&](int row) {
    float* residual = value(op.residual) + size_t(row) * n;
    kernels_.add(value(op.x) + size_t(row) * n, residual, n, op.scale);
    if (op.weight) kernels_.rms_norm(residual, op.weight->data(), value(op.out) + size_t(row) * n, n, op.eps);
  });
}

void Program::execute(const GatedOp& op, const Rows& rows, int thread) {
  int n = widths_[op.out];
  int pieces = (n + kGatedColumns - 1) / kGatedColumns;
  team_.parallel_for(thread, rows.count * pieces, [&](int item) {
    size_t row = item / pieces;
    int begin = item % pieces * kGatedColumns, count = std::min(kGatedColumns, n - begin);
    const float* gate = value(op.x) + row * 2 * n + begin;
    kernels_.gated(gate, gate + n, value(op.out) + row * n + begin, count, op.activation);
  });
}

void Program::execute(const RotateOp& op, const Rows& rows, const KVCache& cache, int thread) {
  const HeadParams& heads = op.heads;
  size_t in = size_t(heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim;
  size_t out = size_t(heads.num_heads) * heads.head_dim, half = heads.rotary_dim / 2;
  const float* cos = op.rotary < 0 ? nullptr : rotaries_[op.rotary].cos.data();
  const float* sin = op.rotary < 0 ? nullptr : rotaries_[op.rotary].sin.data();
  team_.parallel_for(thread, rows.count, [&](int row) {
    kernels_.rotate_and_write(heads, value(op.qkv) + row * in, cos + row * half, sin + row * half,
                              value(op.out) + row * out, cache.layer(op.layer), rows.slots[row]);
  });
}

void Program::execute(const AttendOp& op, const Rows& rows, const KVCache& cache, int thread) {
  const AttentionPlan* plan = nullptr;
  for (const auto& known : plans_)
    if (same_window(known.first, op.params)) plan = &known.second;
  const float* q = value(op.q);
  float* out = value(op.out);
  team_.parallel_for(thread, int(plan->items.size()), [&](int i) {
    kernels_.attend(op.params, rows.attention, cache.layer(op.layer), q, plan->items[i], partials_.get(), out,
                    scratch_[thread].get());
  });
  if (plan->merges.empty()) return;
  team_.parallel_for(thread, int(plan->merges.size()), [&](int i) {
    kernels_.merge(op.params, rows.attention, plan->merges[i], partials_.get(), out);
  });
}

// --- linear layers -----------------------------------------------------------------------------------------

void Program::execute(const LinearOp& op, const Rows& rows, int thread) {
  size_t ld = widths_[op.out];
  float* out = value(op.out);
  size_t begin = 0;
  while (begin < op.parts.size()) {  // parts that read the same prepared activations go together
    size_t end = begin;
    int n = 0;
    for (; end < op.parts.size() && same_input(op.parts[begin]->packed, op.parts[end]->packed); end++)
      n += op.parts[end]->packed.n;
    multiply(&op.parts[begin], int(end - begin), value(op.x), rows.count, out, ld, thread);
    out += n;
    begin = end;
  }
}

// The activations `weight` reads, made of x [rows, k]. One row is prepared by each thread for itself, which
// costs less than waiting for each other.
Activations Program::prepare(const PackedWeight& weight, const float* x, int rows, int thread) {
  Activations a{};
  a.rows = rows;
  a.k = weight.k;
  a.quantized = weight.quantized();
  a.split = splits_input(kernels_, weight);
  a.tile = kernels_.tile_rows(weight.format, rows);
  a.k_padded = weight.k_padded;
  if (a.quantized) {
    a.group = weight.group;
    a.groups = weight.num_groups();
  } else if (rows == 1 && !a.split) {
    a.f32 = x;
    return a;
  }
  InputLayout layout(kernels_, weight, rows);
  uint8_t* memory = reinterpret_cast<uint8_t*>((rows == 1 ? single_inputs_[thread] : shared_input_).get());
  a.f32 = reinterpret_cast<const float*>(memory);
  a.bf16 = reinterpret_cast<const uint16_t*>(memory);
  a.q = reinterpret_cast<const int8_t*>(memory);
  a.scale = reinterpret_cast<const float*>(memory + layout.scale);
  a.sum = reinterpret_cast<const int32_t*>(memory + layout.sum);
  a.outlier_count = reinterpret_cast<const int32_t*>(memory + layout.outlier_count);
  a.outliers = reinterpret_cast<const Outlier*>(memory + layout.outliers);
  if (rows == 1)
    kernels_.prepare(x, weight.k, a, 0);
  else
    team_.parallel_for(thread, a.num_tiles(), [&](int tile) { kernels_.prepare(x, weight.k, a, tile); });
  return a;
}

// fn(panel, end of panels, tile, end of tiles) for all pieces of a product with `panels` panels like `weight`'s. Blocks of rows whose
// activations fit the cache are multiplied with all panels in turn.
template <class F>
void Program::over_panels(const PackedWeight& weight, const Activations& a, int panels, int thread, F&& fn) {
  int block_rows = std::max(kMinBlockRows, int(kInputBlock / input_bytes(kernels_, weight)));
  int block_tiles = std::max(1, block_rows / a.tile);
  int blocks = (a.num_tiles() + block_tiles - 1) / block_tiles;
  block_tiles = (a.num_tiles() + blocks - 1) / blocks;
  int chunk = std::max(1, panels / (team_.threads() * kItemsPerThread));
  int chunks = (panels + chunk - 1) / chunk;
  team_.parallel_for(thread, blocks * chunks, [&](int item) {
    int tile = item / chunks * block_tiles, panel = item % chunks * chunk;
    fn(panel, std::min(panel + chunk, panels), tile, std::min(tile + block_tiles, a.num_tiles()));
  });
}

// out[:, i-th part's columns] = x @ part.T + bias.
void Program::multiply(const WeightPtr* parts, int num_parts, const float* x, int rows, float* out, size_t ld,
                       int thread) {
  Activations a = prepare(parts[0]->packed, x, rows, thread);
  int panels = 0;
  for (int p = 0; p < num_parts; p++) panels += parts[p]->packed.num_panels();
  over_panels(parts[0]->packed, a, panels, thread, [&](int panel, int last, int tile, int tile_end) {
    float* columns = out;
    for (int p = 0, first = 0; p < num_parts && panel < last; p++) {
      const PackedWeight& w = parts[p]->packed;
      for (; panel < std::min(last, first + w.num_panels()); panel++)
        kernels_.linear(w, panel - first, a, tile, tile_end, columns, ld);
      first += w.num_panels();
      columns += w.n;
    }
  });
}

void Program::execute(const GatedLinearOp& op, const Rows& rows, int thread) {
  const PackedWeight &gate = op.gate->packed, &up = op.up->packed;
  Activations a = prepare(gate, value(op.x), rows.count, thread);
  over_panels(gate, a, gate.num_panels(), thread, [&](int panel, int last, int tile, int tile_end) {
    for (; panel < last; panel++)
      kernels_.gated_linear(gate, up, panel, a, tile, tile_end, value(op.out), gate.n, op.activation);
  });
}

void Program::logits(const WeightPtr& head, const float* x, int rows, float* out, float scale, float cap) {
  Busy busy(busy_);
  const PackedWeight& w = head->packed;
  for (int begin = 0; begin < rows; begin += kMaxRows) {
    int count = std::min(kMaxRows, rows - begin);
    float* result = out + size_t(begin) * w.n;
    reserve_input(w, count);
    team_.run([&](int thread) {
      multiply(&head, 1, x + size_t(begin) * w.k, count, result, w.n, thread);
      if (scale == 1.0f && cap == 0.0f) return;
      team_.parallel_for(thread, count, [&](int row) {
        kernels_.scale_and_cap(result + size_t(row) * w.n, w.n, scale, cap);
      });
    });
  }
}

// --- choosing tokens ---------------------------------------------------------------------------------------

void Program::argmax(const float* x, int rows, int n, int64_t* out) {
  Busy busy(busy_);
  team_.run([&](int thread) {
    team_.parallel_for(thread, rows, [&](int row) { out[row] = kernels_.argmax(x + size_t(row) * n, n); });
  });
}

std::vector<int> Program::mask(float* x, int n, const std::vector<int>& rows,
                               const std::vector<std::pair<const uint8_t*, size_t>>& masks) {
  Busy busy(busy_);
  std::vector<int> tokens(rows.size());
  team_.run([&](int thread) {
    team_.parallel_for(thread, int(rows.size()), [&](int i) {
      tokens[i] = gqa::mask(kernels_, x + size_t(rows[i]) * n, n, masks[i].first, masks[i].second);
    });
  });
  return tokens;
}

std::vector<int> Program::draw(const float* x, int n, const std::vector<int>& rows,
                               const std::vector<DrawParams>& params) {
  Busy busy(busy_);
  std::vector<int> tokens(rows.size());
  draw_scratch_.resize(team_.threads());
  team_.run([&](int thread) {
    team_.parallel_for(thread, int(rows.size()), [&](int i) {
      tokens[i] = gqa::draw(kernels_, x + size_t(rows[i]) * n, n, params[i], draw_scratch_[thread]);
    });
  });
  return tokens;
}

}  // namespace gqa
