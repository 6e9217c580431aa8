// The Python module: weights, caches and programs, over raw pointers of torch tensors.
//
// Owns the translation of names and addresses. Whoever calls keeps a tensor alive while its pointer is in use and
// vouches for its shape: the only caller is gqa_serve/engine/backends/cpu.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <stdexcept>

#include "isa.h"
#include "pack.h"
#include "peaks.h"
#include "program.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace gqa;

namespace {

using Address = uintptr_t;

template <class T>
const T* pointer(Address address) {
  return reinterpret_cast<const T*>(address);
}

template <class Enum>
Enum named(const std::string& name, std::initializer_list<std::pair<const char*, Enum>> known) {
  for (const auto& [text, value] : known)
    if (name == text) return value;
  throw std::invalid_argument("unknown name " + name);
}

WeightFormat weight_format(const std::string& name) {
  using enum WeightFormat;
  return named<WeightFormat>(
      name, {{"float32", F32}, {"bfloat16", BF16}, {"float16", F16}, {"int8", I8}, {"int4", I4}});
}

const char* format_name(const Weight& weight) {
  static const char* const names[] = {"float32", "bfloat16", "float16", "int8", "int4"};
  return names[int(weight.packed.format)];
}

KVFormat kv_format(const std::string& name) {
  using enum KVFormat;
  return named<KVFormat>(name, {{"float32", F32}, {"bfloat16", BF16}, {"int8", I8}});
}

Floats floats(Address address, size_t count) {
  const float* data = pointer<float>(address);
  return address ? std::make_shared<const std::vector<float>>(data, data + count) : nullptr;
}

// Packs matrices, on the threads that will multiply with them.
class Packer {
 public:
  explicit Packer(int threads) : team_(threads) {}

  // A float matrix [n, k] whose rows are `row_stride` elements apart. Raises ValueError for a weight that is not
  // finite, or too large for the format.
  WeightPtr pack(Address source, const std::string& dtype, int n, int k, size_t row_stride, const std::string& format,
                 int group, bool has_min) {
    SourceType type = named<SourceType>(
        dtype, {{"float32", SourceType::F32}, {"bfloat16", SourceType::BF16}, {"float16", SourceType::F16}});
    WeightPtr weight = allocate(weight_format(format), n, k, group, has_min);
    fill(*weight, [&](int panel) {
      return pack_float(weight->packed, weight->memory.data, pointer<void>(source), type, row_stride, panel, panel + 1);
    });
    return weight;
  }

  // A matrix in blocks of a GGUF type whose values int8 or int4 hold exactly.
  WeightPtr pack_gguf(Address source, const std::string& type, int n, int k, size_t row_bytes) {
    GgufType kind =
        named<GgufType>(type, {{"Q8_0", GgufType::Q8_0}, {"Q4_0", GgufType::Q4_0}, {"Q4_1", GgufType::Q4_1}});
    WeightFormat format = kind == GgufType::Q8_0 ? WeightFormat::I8 : WeightFormat::I4;
    WeightPtr weight = allocate(format, n, k, kQuantBlock, kind == GgufType::Q4_1);
    fill(*weight, [&](int panel) {
      return gqa::pack_gguf(weight->packed, weight->memory.data, pointer<uint8_t>(source), kind, row_bytes, panel,
                            panel + 1);
    });
    return weight;
  }

 private:
  WeightPtr allocate(WeightFormat format, int n, int k, int group, bool has_min) {
    auto weight = std::make_shared<Weight>();
    PackedWeight& packed = weight->packed;
    packed = {};
    packed.format = format;
    packed.has_min = has_min;
    packed.n = n;
    packed.k = k;
    packed.k_padded = padded_inputs(format, k);
    packed.group = packed.quantized() && group == 0 ? packed.k_padded : group;
    if (packed.quantized() && (packed.group <= 0 || packed.group % kQuantBlock))
      throw std::invalid_argument("a quantization group is a multiple of 32");
    if (has_min && format != WeightFormat::I4) throw std::invalid_argument("only int4 has minima");
    packed.panel_bytes = panel_bytes(format, k, packed.group, has_min);
    weight->memory = arena_.allocate(packed.num_panels() * packed.panel_bytes);
    packed.data = weight->memory.data;
    return weight;
  }

  template <class Fill>
  void fill(const Weight& weight, Fill&& panel) {
    nb::gil_scoped_release release;
    std::atomic<bool> finite = true;
    team_.run([&](int thread) {
      team_.parallel_for(thread, weight.packed.num_panels(), [&](int i) {
        if (!panel(i)) finite = false;
      });
    });
    if (!finite) throw std::invalid_argument(
          "holds values that are not finite, so the checkpoint is damaged, or too large for the format asked for, so "
          "another --dtype or --quantization is needed");
  }

  Arena arena_;
  Team team_;
};

Activation activation_kind(const std::string& name) {
  return named<Activation>(
      name, {{"silu", Activation::Silu}, {"gelu", Activation::Gelu}, {"gelu_tanh", Activation::GeluTanh}});
}

HeadParams head_params(int num_heads, int num_kv_heads, int head_dim, int rotary_dim, const std::string& qk_norm,
                       float eps) {
  HeadParams heads{};
  heads.num_heads = num_heads;
  heads.num_kv_heads = num_kv_heads;
  heads.head_dim = head_dim;
  heads.rotary_dim = rotary_dim;
  heads.qk_norm =
      named<QKNorm>(qk_norm, {{"none", QKNorm::None}, {"head", QKNorm::Head}, {"full", QKNorm::Full}});
  heads.eps = eps;
  return heads;
}

void bind_weights(nb::module_& m) {
  nb::class_<Weight>(m, "Weight")
      .def_prop_ro("n", [](const Weight& w) { return w.packed.n; })
      .def_prop_ro("k", [](const Weight& w) { return w.packed.k; })
      .def_prop_ro("nbytes", [](const Weight& w) { return w.memory.size; })
      .def_prop_ro("format", &format_name)
      .def("same_input", [](const Weight& w, const Weight& other) { return same_input(w.packed, other.packed); },
           "other"_a, "Whether both read the same prepared activations.")
      .def(
          "set_bias",
          [](Weight& w, Address bias) {
            w.bias.assign(pointer<float>(bias), pointer<float>(bias) + w.packed.n);
            w.packed.bias = w.bias.data();
          },
          "bias"_a)
      .def(
          "unpack",
          [](const Weight& w, int first, int count, Address out) {
            for (int i = 0; i < count; i++)
              unpack_row(w.packed, first + i, reinterpret_cast<float*>(out) + size_t(i) * w.packed.k);
          },
          "first"_a, "count"_a, "out"_a);
  nb::class_<Packer>(m, "Packer")
      .def(nb::init<int>(), "threads"_a)
      .def("pack", &Packer::pack, "source"_a, "dtype"_a, "n"_a, "k"_a, "row_stride"_a, "format"_a, "group"_a = 0,
           "has_min"_a = false)
      .def("pack_gguf", &Packer::pack_gguf, "source"_a, "type"_a, "n"_a, "k"_a, "row_bytes"_a);
}

void bind_cache(nb::module_& m) {
  nb::class_<KVCache>(m, "KVCache")
      .def(
          "__init__",
          [](KVCache* self, int layers, int blocks, const std::string& format, int kv_heads, int head_dim,
             int block_size) { new (self) KVCache(layers, blocks, kv_format(format), kv_heads, head_dim, block_size); },
          "num_layers"_a, "num_blocks"_a, "format"_a, "num_kv_heads"_a, "head_dim"_a, "block_size"_a)
      .def_prop_ro("num_blocks", &KVCache::num_blocks)
      .def_static(
          "block_bytes",
          [](const std::string& format, int kv_heads, int head_dim, int block_size) {
            return KVCache::block_bytes(kv_format(format), kv_heads, head_dim, block_size);
          },
          "format"_a, "num_kv_heads"_a, "head_dim"_a, "block_size"_a);
}

void bind_recording(nb::class_<Program>& program) {
  program
      .def("add_value", &Program::add_value, "width"_a)
      .def(
          "add_rotary",
          [](Program& p, Address inv_freq, int n, float scale) {
            return p.add_rotary({pointer<float>(inv_freq), pointer<float>(inv_freq) + n}, scale);
          },
          "inv_freq"_a, "n"_a, "scale"_a)
      .def(
          "embed",
          [](Program& p, WeightPtr table, Value out, float scale, int first, int vocabulary) {
            p.add(EmbedOp{table, out, scale, first, vocabulary > 0 ? vocabulary : table->packed.n});
          },
          "table"_a, "out"_a, "scale"_a, "first"_a = 0, "vocabulary"_a = 0,
          "The table holds `vocabulary`'s rows from `first` on; 0: its own rows are the vocabulary.")
      .def(
          "call",
          [](Program& p, nb::callable function, Value x) {
            p.add(CallOp{x, x, [function](float* data, int rows) {
                           nb::gil_scoped_acquire acquire;
                           function(reinterpret_cast<Address>(data), rows);
                         }});
          },
          "function"_a, "x"_a, "function(address, rows) changes rows of x in place, with the interpreter's lock.")
      .def(
          "rms_norm",
          [](Program& p, Value x, Address weight, int n, Value out, float eps) {
            p.add(NormOp{x, out, floats(weight, n), eps});
          },
          "x"_a, "weight"_a, "n"_a, "out"_a, "eps"_a)
      .def(
          "add_rms_norm",
          [](Program& p, Value x, Value residual, Address weight, int n, Value out, float eps, float scale) {
            p.add(AddNormOp{x, residual, out, floats(weight, n), eps, scale});
          },
          "x"_a, "residual"_a, "weight"_a, "n"_a, "out"_a, "eps"_a, "scale"_a)
      .def(
          "linear",
          [](Program& p, std::vector<WeightPtr> parts, Value x, Value out) {
            p.add(LinearOp{std::move(parts), x, out});
          },
          "parts"_a, "x"_a, "out"_a)
      .def(
          "gated_linear",
          [](Program& p, WeightPtr gate, WeightPtr up, Value x, Value out, const std::string& activation) {
            if (gate->packed.n != up->packed.n || !same_input(gate->packed, up->packed))
              throw std::invalid_argument("gate and up differ in shape or groups");
            p.add(GatedLinearOp{gate, up, x, out, activation_kind(activation)});
          },
          "gate"_a, "up"_a, "x"_a, "out"_a, "activation"_a)
      .def(
          "gated",
          [](Program& p, Value x, Value out, const std::string& activation) {
            p.add(GatedOp{x, out, activation_kind(activation)});
          },
          "x"_a, "out"_a, "activation"_a)
      .def(
          "rotate_and_write",
          [](Program& p, int layer, Value qkv, Value out, int num_heads, int num_kv_heads, int head_dim, int rotary,
             int rotary_dim, const std::string& qk_norm, Address q_norm, int q_size, Address k_norm, int k_size,
             float eps) {
            RotateOp op{layer, qkv, out, rotary,
                        head_params(num_heads, num_kv_heads, head_dim, rotary_dim, qk_norm, eps),
                        floats(q_norm, q_size), floats(k_norm, k_size)};
            op.heads.q_norm = op.q_norm ? op.q_norm->data() : nullptr;
            op.heads.k_norm = op.k_norm ? op.k_norm->data() : nullptr;
            p.add(std::move(op));
          },
          "layer"_a, "qkv"_a, "out"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "rotary"_a, "rotary_dim"_a,
          "qk_norm"_a, "q_norm"_a, "q_size"_a, "k_norm"_a, "k_size"_a, "eps"_a)
      .def(
          "attend",
          [](Program& p, int layer, Value q, Value out, int num_heads, int num_kv_heads, int head_dim, float scale,
             float soft_cap, int window) {
            p.add(AttendOp{layer, q, out, {num_heads, num_kv_heads, head_dim, scale, soft_cap, window}});
          },
          "layer"_a, "q"_a, "out"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "scale"_a, "soft_cap"_a,
          "window"_a);
}

// A StepPlan's rows (engine/batch.py) as the flat arrays of a step. Raises ValueError for blocks that are missing or
// not the cache's.
Step read_plan(const nb::list& rows, const KVCache& cache) {
  Step step;
  const int block_size = cache.block_size();
  for (nb::handle row : rows) {
    const int64_t count = int64_t(nb::len(nb::handle(nb::object(row.attr("token_ids"))))), start = nb::cast<int64_t>(row.attr("start"));
    const int blocks = int((start + count + block_size - 1) / block_size);
    step.max_blocks = std::max(step.max_blocks, blocks);
    step.query_lens.push_back(int32_t(count));
    step.context_lens.push_back(int32_t(start + count));
  }
  step.block_tables.resize(rows.size() * size_t(step.max_blocks));
  size_t number = 0;
  for (nb::handle row : rows) {
    const nb::list tokens = nb::cast<nb::list>(row.attr("token_ids")), blocks = nb::cast<nb::list>(row.attr("block_ids"));
    const int context = step.context_lens[number], used = (context + block_size - 1) / block_size;
    int32_t* table = step.block_tables.data() + number++ * size_t(step.max_blocks);
    if (nb::len(blocks) < size_t(used)) throw std::invalid_argument("a request lacks blocks for its tokens");
    for (int i = 0; i < used; i++) {
      table[i] = nb::cast<int32_t>(blocks[i]);
      if (table[i] < 0 || table[i] >= cache.num_blocks()) throw std::invalid_argument("a block is not the cache's");
    }
    int64_t position = context - int64_t(nb::len(tokens));
    for (nb::handle token : tokens) {
      step.token_ids.push_back(nb::cast<int64_t>(token));
      step.slots.push_back(int64_t(table[position / block_size]) * block_size + position % block_size);
      step.positions.push_back(position++);
    }
    const int wanted = nb::cast<int>(row.attr("num_logits")), end = int(step.token_ids.size());
    if (wanted < 0 || size_t(wanted) > nb::len(tokens)) throw std::invalid_argument("more logits than tokens");
    for (int i = end - wanted; i < end; i++) step.result_rows.push_back(i);
  }
  return step;
}

void bind_computing(nb::class_<Program>& program) {
  program
      .def(
          "run",
          [](Program& p, const KVCache& cache, nb::list rows, Value result, Address out) {
            Step step = read_plan(rows, cache);
            nb::gil_scoped_release release;
            p.run(step, cache, result, reinterpret_cast<float*>(out));
          },
          "cache"_a, "rows"_a, "result"_a, "out"_a)
      .def("profile", &Program::profile)
      .def(
          "logits",
          [](Program& p, WeightPtr head, Address x, int rows, Address out, float scale, float cap) {
            nb::gil_scoped_release release;
            p.logits(head, pointer<float>(x), rows, reinterpret_cast<float*>(out), scale, cap);
          },
          "head"_a, "x"_a, "rows"_a, "out"_a, "scale"_a, "cap"_a)
      .def(
          "argmax",
          [](Program& p, Address x, int rows, int n) {
            std::vector<int64_t> tokens(rows);
            {
              nb::gil_scoped_release release;
              p.argmax(pointer<float>(x), rows, n, tokens.data());
            }
            return tokens;
          },
          "x"_a, "rows"_a, "n"_a)
      .def(
          "mask",
          [](Program& p, Address x, int n, const std::vector<int>& rows, const std::vector<nb::bytes>& masks) {
            std::vector<std::pair<const uint8_t*, size_t>> views;
            for (size_t i = 0; i < rows.size(); i++)
              views.emplace_back(static_cast<const uint8_t*>(masks.at(i).data()), masks[i].size());
            nb::gil_scoped_release release;
            return p.mask(reinterpret_cast<float*>(x), n, rows, views);
          },
          "x"_a, "n"_a, "rows"_a, "masks"_a)
      .def(
          "draw",
          [](Program& p, Address x, int n, const std::vector<int>& rows, const std::vector<float>& temperatures,
             const std::vector<int>& top_ks, const std::vector<float>& top_ps, const std::vector<float>& min_ps,
             const std::vector<double>& units) {
            std::vector<DrawParams> params;
            for (size_t i = 0; i < rows.size(); i++)
              params.push_back({temperatures.at(i), top_ks.at(i), top_ps.at(i), min_ps.at(i), units.at(i)});
            nb::gil_scoped_release release;
            return p.draw(pointer<float>(x), n, rows, params);
          },
          "x"_a, "n"_a, "rows"_a, "temperatures"_a, "top_ks"_a, "top_ps"_a, "min_ps"_a, "units"_a);
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native CPU kernels of gqa-serve.";
  m.def("team_error", &team_error, "Why there can be no threads in this process; empty if there can.");
  m.def("isa_levels", &isa_levels, "Instruction sets this CPU and this build support, the best last.");
  m.def(
      "peaks",
      [](const std::string& isa, int threads, size_t buffer_bytes) {
        Team team(threads);
        nb::gil_scoped_release release;
        Peaks peaks = measure_peaks(isa, team, buffer_bytes);
        return std::vector<double>{peaks.read_bytes, peaks.flops, peaks.int8_ops, peaks.bf16_ops};
      },
      "isa"_a, "threads"_a, "buffer_bytes"_a,
      "What this machine can do at most per second: bytes read, operations in float32, in int8, in tiles of bfloat16.");
  bind_weights(m);
  bind_cache(m);
  nb::class_<Program> program(m, "Program");
  program.def(
      "__init__",
      [](Program* self, const std::string& isa, int threads) { new (self) Program(kernels_for(isa), threads); },
      "isa"_a, "threads"_a);
  bind_recording(program);
  bind_computing(program);
}
