// A recorded forward pass, and its replay: one native call computes a whole step.
//
// Owns the list of operations, the buffers between them and the loop over a step's rows. Does not know models:
// Python runs the model's definition once with symbolic values and records each backend operation here
// (gqa_serve/engine/backends/cpu_recorder.py). All operations of a step run inside one parallel region; threads meet at
// a barrier after each.
// Invariant: an operation's rows are independent of each other but for attention, which reads the cache; so a
// step of many tokens may be computed kMaxRows at a time, and after the last attention only the rows whose results are
// wanted.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "sampling.h"
#include "team.h"

namespace gqa {

constexpr int kMaxRows = 512;  // tokens computed at a time: bounds the buffers, not the step

// A packed weight and the memory that holds it.
struct Weight {
  PackedWeight packed;
  Memory memory;
  std::vector<float> bias;
};
using WeightPtr = std::shared_ptr<Weight>;
using Floats = std::shared_ptr<const std::vector<float>>;

// Value numbers name [rows, width] float32 buffers; see Program::add_value.
using Value = int;

struct EmbedOp {  // the table holds rows of tokens first .. first + n of `vocabulary`; those of others are zeros
  WeightPtr table;
  Value out;
  float scale;
  int first, vocabulary;
};
struct NormOp {
  Value x, out;
  Floats weight;
  float eps;
};
struct AddNormOp {  // residual += scale * x; out = norm(residual), unless weight is null
  Value x, residual, out;
  Floats weight;
  float eps, scale;
};
struct LinearOp {  // parts side by side in the output
  std::vector<WeightPtr> parts;
  Value x, out;
};
struct GatedLinearOp {  // out = activation(gate(x)) * up(x)
  WeightPtr gate, up;
  Value x, out;
  Activation activation;
};
struct GatedOp {  // x: gate, then up
  Value x, out;
  Activation activation;
};
struct RotateOp {
  int layer;
  Value qkv, out;
  int rotary;  // index, or -1
  HeadParams heads;
  Floats q_norm, k_norm;
};
struct AttendOp {
  int layer;
  Value q, out;
  AttentionParams params;
};
// Changes `rows` rows of a value in place. Called by the thread that called run(), while the others wait.
using Call = std::function<void(float* x, int rows)>;
struct CallOp {
  Value x, out;  // the same
  Call function;
};
using Op = std::variant<EmbedOp, NormOp, AddNormOp, LinearOp, GatedLinearOp, GatedOp, RotateOp, AttendOp, CallOp>;

// Whether matrices read the same prepared activations.
bool same_input(const PackedWeight& a, const PackedWeight& b);

// The K and V of all layers.
class KVCache {
 public:
  KVCache(int num_layers, int num_blocks, KVFormat format, int num_kv_heads, int head_dim, int block_size);
  const KVLayer& layer(int index) const { return layers_.at(index); }
  int num_layers() const { return int(layers_.size()); }
  int num_blocks() const { return num_blocks_; }
  int block_size() const { return layers_.at(0).block_size; }
  // Bytes of one block of one layer: K, V and scales.
  static size_t block_bytes(KVFormat format, int num_kv_heads, int head_dim, int block_size);

 private:
  int num_blocks_;
  Mapping memory_;
  std::vector<KVLayer> layers_;
};

// One step: T tokens of B requests, rows in the order of requests.
struct Step {
  int max_blocks = 0;
  std::vector<int64_t> token_ids, positions, slots;  // [T]
  std::vector<int32_t> query_lens, context_lens;     // [B]; context: computed + new
  std::vector<int32_t> block_tables;                 // [B, max_blocks]
  std::vector<int> result_rows;                      // of the T tokens, ascending: whose hidden states are wanted
};

class Program {
 public:
  Program(const Kernels& kernels, int threads);

  Value add_value(int width);
  void add(Op op) { ops_.push_back(std::move(op)); }
  // A rotary embedding: radians per position [rotary_dim / 2], factor on cosines and sines. Returns its index.
  int add_rotary(std::vector<float> inv_freq, float scale);

  // Compute a step and copy the wanted rows of value `result` to `out` [step.result_rows, width].
  void run(const Step& step, const KVCache& cache, Value result, float* out);
  // out [rows, n] = scale_and_cap(x [rows, k] @ head.T).
  void logits(const WeightPtr& head, const float* x, int rows, float* out, float scale, float cap);
  // First index of each row's largest value; -1 where a value is not finite. x [rows, n].
  void argmax(const float* x, int rows, int n, int64_t* out);
  // Row rows[i] of x [.., n] keeps what masks[i] allows, the best of which is returned; see sampling.h.
  std::vector<int> mask(float* x, int n, const std::vector<int>& rows,
                        const std::vector<std::pair<const uint8_t*, size_t>>& masks);
  // One random token for each of the rows `rows` of x [.., n]; see sampling.h.
  std::vector<int> draw(const float* x, int n, const std::vector<int>& rows, const std::vector<DrawParams>& params);

  // Where run() spends its time: name of an operation and the seconds of its first thread, waiting included, since
  // the last call. Counting starts with the first call, and costs a clock reading per operation from then on.
  std::vector<std::pair<std::string, double>> profile();

 private:
  struct Rotary {
    std::vector<float> inv_freq;
    float scale;
    std::vector<float> cos, sin;  // [rows, rotary_dim / 2] of the current rows
  };
  class Busy;
  struct Rows;  // the part of a step that is computed at once

  void reserve(int rows);
  void find_tail(Value result);
  void reserve_input(const PackedWeight& weight, int rows);
  Rows cut(const Step& step, int begin, int end) const;
  void plan_attention_of(const Rows& rows);
  void execute(const Rows& rows, const KVCache& cache, int thread);
  void execute(const Op& op, const Rows& rows, const KVCache& cache, int thread);
  void gather_wanted(const Rows& rows, int thread);
  void compute_angles(const Rows& rows, int thread);
  void execute(const EmbedOp& op, const Rows& rows, int thread);
  void execute(const NormOp& op, const Rows& rows, int thread);
  void execute(const AddNormOp& op, const Rows& rows, int thread);
  void execute(const LinearOp& op, const Rows& rows, int thread);
  void execute(const GatedLinearOp& op, const Rows& rows, int thread);
  void execute(const GatedOp& op, const Rows& rows, int thread);
  void execute(const CallOp& op, const Rows& rows, int thread);
  void execute(const RotateOp& op, const Rows& rows, const KVCache& cache, int thread);
  void execute(const AttendOp& op, const Rows& rows, const KVCache& cache, int thread);
  template <class F>
  void over_panels(const PackedWeight& weight, const Activations& a, int panels, int thread, F&& fn);
  void multiply(const WeightPtr* parts, int num_parts, const float* x, int rows, float* out, size_t ld, int thread);
  Activations prepare(const PackedWeight& weight, const float* x, int rows, int thread);
  float* value(Value v) { return buffers_[v]; }

  struct Free {
    void operator()(float* p) const;
  };
  using Buffer = std::unique_ptr<float[], Free>;
  static Buffer allocate(size_t floats);

  const Kernels& kernels_;
  Team team_;
  std::atomic<bool> busy_{false};
  std::vector<Op> ops_;
  std::vector<int> widths_;
  std::vector<Rotary> rotaries_;
  int capacity_ = 0;  // rows the buffers hold
  std::unique_ptr<Mapping> memory_;
  std::vector<float*> buffers_;  // of values, in `memory_`
  // Operations from tail_ on follow the last attention (or embedding) and compute the result; they read tail_inputs_ of
  // those before.
  size_t tail_ = 0;
  std::vector<Value> tail_inputs_;
  // Prepared activations: of all rows, and of a single row for each thread.
  size_t shared_input_bytes_ = 0, single_input_bytes_ = 0;
  Buffer shared_input_;
  std::vector<Buffer> single_inputs_;
  std::vector<std::pair<AttentionParams, AttentionPlan>> plans_;
  size_t partials_size_ = 0, scratch_size_ = 0;
  Buffer partials_;
  std::vector<Buffer> scratch_;
  std::vector<DrawScratch> draw_scratch_;
  std::vector<double> seconds_;  // by operation, if they are counted
};

}  // namespace gqa
