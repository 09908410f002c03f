// Norms without a residual, forward and backward: the launches of kpt_plugin_triton.norm_rows without Python on
// the way. Triton has compiled the kernels; Python says once, for each kind of call, what is launched (a Plan).
//
// The driver is reached by addresses that Python passes, and both vendors' launch functions take the same
// arguments, so that nothing here needs their headers.

#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include <ATen/ATen.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// Tensors of a launch, in the order in which their addresses are passed to `start`.
enum Slot { X, WEIGHT, BIAS, Y, MEAN, RSTD, DY, DX, WEIGHT_SUMS, BIAS_SUMS, DWEIGHT, DBIAS, SLOTS };
constexpr int MOST_PARAMETERS = 24;
constexpr int NO_CONTEXT = 201;  // CUDA_ERROR_INVALID_CONTEXT: a thread that has not used the device yet

using LaunchFunction = int (*)(
    void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
using StreamFunction = int (*)(int32_t, void**);
using ContextFunction = int (*)(void*);

struct Driver {
  LaunchFunction launch = nullptr;
  StreamFunction stream = nullptr;
  ContextFunction set_context = nullptr;  // null where threads need none
};
Driver driver;

struct Parameter {
  int slot;       // a Slot, or -1 for a number
  uint64_t bits;  // the number, as the kernel reads it
};

struct Launch {
  void* function = nullptr;
  unsigned grid[3] = {0, 0, 0};
  unsigned threads = 0;
  unsigned shared = 0;
  std::vector<Parameter> parameters;
};

struct Plan {
  Launch forward;
  std::vector<Launch> backward;
  int64_t programs = 0;  // partial sums of the weight's and the bias's gradients
  bool centred = false;
  bool records = false;  // whether there is a backward pass, which needs the statistics
  bool sums_weight = false;
  bool sums_bias = false;
  at::ScalarType wide = at::kFloat;
  void* context = nullptr;
};

// What a plan is good for.
struct Key {
  int64_t rows, columns;
  double eps, offset;
  int device, dtype, weight, bias, wanted;
  bool centred;
  bool operator==(const Key& other) const {
    return rows == other.rows && columns == other.columns && eps == other.eps && offset == other.offset &&
        device == other.device && dtype == other.dtype && weight == other.weight && bias == other.bias &&
        wanted == other.wanted && centred == other.centred;
  }
};

struct Hash {
  size_t operator()(const Key& key) const {
    size_t seed = std::hash<int64_t>()(key.rows * 0x9e3779b97f4a7c15 + key.columns);
    const int small = ((key.device * 64 + key.dtype) * 64 + key.weight) * 64 + key.bias * 16 + key.wanted * 2;
    return seed * 31 + static_cast<size_t>(small + key.centred);
  }
};

std::unordered_map<Key, std::unique_ptr<Plan>, Hash> plans;
// Plans that are not used any more, but that nodes of recorded calls may still refer to.
std::vector<std::unique_ptr<Plan>> retired;

void start(const Launch& launch, uint64_t* addresses, void* stream, void* context) {
  void* parameters[MOST_PARAMETERS + 2];
  size_t count = 0;
  for (const Parameter& each : launch.parameters) {
    parameters[count++] = each.slot < 0 ? const_cast<uint64_t*>(&each.bits) : addresses + each.slot;
  }
  uint64_t scratch = 0;  // kernels that ask for scratch memory get no plan
  parameters[count++] = &scratch;
  parameters[count++] = &scratch;
  for (int attempt = 0;; ++attempt) {
    const int code = driver.launch(
        launch.function, launch.grid[0], launch.grid[1], launch.grid[2], launch.threads, 1, 1, launch.shared,
        stream, parameters, nullptr);
    if (code == 0) return;
    const bool again = attempt == 0 && code == NO_CONTEXT && driver.set_context != nullptr;
    TORCH_CHECK(again && driver.set_context(context) == 0, "a kernel could not be launched: error ", code);
  }
}

void* current_stream(const at::Tensor& like) {
  void* stream = nullptr;
  TORCH_CHECK(driver.stream(like.get_device(), &stream) == 0, "the current stream could not be read");
  return stream;
}

uint64_t address(const at::Tensor& tensor) {
  return tensor.defined() ? reinterpret_cast<uint64_t>(tensor.data_ptr()) : 0;
}

bool aligned(const at::Tensor& tensor) { return (address(tensor) & 15) == 0; }

// Elements of a part of an allocation, so that the next part starts at a multiple of 16 bytes.
int64_t padded(int64_t count) { return (count + 3) / 4 * 4; }

at::Tensor forward(const Plan& plan, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                   at::Tensor& statistics) {
  at::Tensor y = at::empty(x.sizes(), x.options());
  uint64_t at[SLOTS] = {};
  if (plan.records) {
    const int64_t rows = x.numel() / x.size(-1);
    statistics = at::empty({plan.centred ? 2 * padded(rows) : rows}, x.options().dtype(plan.wide));
    at[RSTD] = address(statistics);
    if (plan.centred) at[MEAN] = at[RSTD] + padded(rows) * statistics.element_size();
  }
  at[X] = address(x);
  at[WEIGHT] = address(weight);
  at[BIAS] = address(bias);
  at[Y] = address(y);
  start(plan.forward, at, current_stream(x), plan.context);
  return y;
}

struct Norm : public torch::autograd::Function<Norm> {
  static Variable forward(AutogradContext* context, const Variable& x, const std::optional<Variable>& weight,
                          const std::optional<Variable>& bias, int64_t plan) {
    at::Tensor statistics;
    at::Tensor y = ::forward(*reinterpret_cast<const Plan*>(plan), x, weight.value_or(at::Tensor()),
                             bias.value_or(at::Tensor()), statistics);
    // As Python does: a checkpointed call may be recorded by one of the two and repeated by the other.
    context->save_for_backward({x, weight.value_or(at::Tensor()), bias.value_or(at::Tensor())});
    context->saved_data["statistics"] = statistics;
    context->saved_data["plan"] = plan;
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        !at::GradMode::is_enabled(),
        "these norms are differentiable once; call backward without create_graph");
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], &bias = saved[2];
    const at::Tensor& statistics = context->saved_data["statistics"].toTensor();
    const Plan& plan = *reinterpret_cast<const Plan*>(context->saved_data["plan"].toInt());
    at::Tensor dy = gradients[0];
    if (!dy.is_contiguous() || !aligned(dy)) dy = dy.clone(at::MemoryFormat::Contiguous);
    const int64_t columns = x.size(-1), rows = x.numel() / columns;
    at::Tensor dx = at::empty(x.sizes(), x.options()), dweight, dbias, sums;
    uint64_t at[SLOTS] = {};
    if (plan.sums_weight) dweight = at::empty(weight.sizes(), weight.options());
    if (plan.sums_bias) dbias = at::empty(bias.sizes(), bias.options());
    if (plan.sums_weight || plan.sums_bias) {
      const int64_t each = padded(plan.programs * columns);
      const int count = int(plan.sums_weight) + int(plan.sums_bias);
      sums = at::empty({count * each}, statistics.options());
      at[WEIGHT_SUMS] = address(sums);
      at[BIAS_SUMS] = at[WEIGHT_SUMS] + (plan.sums_weight ? each * sums.element_size() : 0);
    }
    at[X] = address(x);
    at[WEIGHT] = address(weight);
    at[RSTD] = address(statistics);
    at[MEAN] = at[RSTD] + padded(rows) * statistics.element_size();
    at[DY] = address(dy);
    at[DX] = address(dx);
    at[DWEIGHT] = address(dweight);
    at[DBIAS] = address(dbias);
    void* stream = current_stream(x);
    for (const Launch& launch : plan.backward) start(launch, at, stream, plan.context);
    return {dx, dweight, dbias, Variable()};
  }
};

// A tensor that has no meaning but its own numbers, side by side at an address that kernels are compiled for.
bool plain(const at::Tensor& tensor) {
  static const c10::DispatchKeySet others({
      c10::DispatchKey::Python, c10::DispatchKey::Functionalize, c10::DispatchKey::FuncTorchBatched,
      c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Conjugate, c10::DispatchKey::Negative,
      c10::DispatchKey::ZeroTensor, c10::DispatchKey::Sparse});
  return tensor.layout() == at::kStrided && !tensor.key_set().has_any(others) && tensor.is_contiguous() &&
      aligned(tensor) && !tensor._fw_grad(0).defined();
}

bool number(PyObject* given, double& value) {
  if (PyFloat_Check(given)) {
    value = PyFloat_AS_DOUBLE(given);
    return true;
  }
  if (!PyLong_CheckExact(given)) return false;
  value = PyLong_AsDouble(given);
  if (value == -1.0 && PyErr_Occurred()) PyErr_Clear();
  return value != -1.0;
}

// norm(x, weight, bias, eps, offset, centred): y, or None for calls that have no plan or need Python.
PyObject* norm(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 6, "norm() takes 6 arguments, ", count, " were given");
  if (!THPVariable_CheckExact(given[0])) Py_RETURN_NONE;
  const at::Tensor& x = THPVariable_Unpack(given[0]);
  std::optional<Variable> weight, bias;
  Key key{};
  key.weight = key.bias = -1;
  const bool recording = at::GradMode::is_enabled();
  key.wanted = recording && x.requires_grad() ? 1 : 0;
  if (x.dim() == 0 || x.numel() == 0 || !plain(x)) Py_RETURN_NONE;
  key.columns = x.size(-1);
  for (int number = 1; number < 3; ++number) {
    if (given[number] == Py_None) continue;
    if (!THPVariable_CheckExact(given[number])) Py_RETURN_NONE;
    const at::Tensor& vector = THPVariable_Unpack(given[number]);
    const bool fits = vector.dim() == 1 && vector.size(0) == key.columns && vector.device() == x.device();
    if (!fits || !plain(vector)) Py_RETURN_NONE;
    if (recording && vector.requires_grad()) key.wanted |= 1 << number;
    (number == 1 ? key.weight : key.bias) = static_cast<int>(vector.scalar_type());
    (number == 1 ? weight : bias) = vector;
  }
  if (!number(given[3], key.eps) || !number(given[4], key.offset)) Py_RETURN_NONE;
  key.rows = x.numel() / key.columns;
  key.device = x.device().index();
  key.dtype = static_cast<int>(x.scalar_type());
  key.centred = given[5] == Py_True;
  const auto found = plans.find(key);
  if (found == plans.end()) Py_RETURN_NONE;
  const bool elsewhere = c10::impl::VirtualGuardImpl(x.device().type()).getDevice().index() != key.device;
  if (elsewhere || c10::impl::TorchDispatchModeTLS::any_modes_set() ||
      c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode)) {
    Py_RETURN_NONE;
  }
  const Plan& plan = *found->second;
  if (key.wanted) {
    return THPVariable_Wrap(Norm::apply(x, weight, bias, reinterpret_cast<int64_t>(&plan)));
  }
  at::Tensor statistics;
  const at::AutoGradMode off(false);
  return THPVariable_Wrap(
      forward(plan, x, weight.value_or(at::Tensor()), bias.value_or(at::Tensor()), statistics));
  END_HANDLE_TH_ERRORS
}

// (function, grid, threads, shared memory, [(slot, kind of number, number)])
using Described = std::tuple<uint64_t, std::tuple<unsigned, unsigned, unsigned>, unsigned, unsigned,
                             std::vector<std::tuple<int, std::string, py::object>>>;

uint64_t bits_of(const std::string& kind, const py::object& value) {
  uint64_t bits = 0;
  const auto copied = [&bits](auto number) { std::memcpy(&bits, &number, sizeof(number)); };
  if (kind == "i32") {
    copied(value.cast<int32_t>());
  } else if (kind == "i64") {
    copied(value.cast<int64_t>());
  } else if (kind == "fp32") {
    copied(value.cast<float>());
  } else if (kind == "fp64") {
    copied(value.cast<double>());
  } else {
    throw py::value_error("a parameter of type " + kind + "; expected i32, i64, fp32 or fp64");
  }
  return bits;
}

Launch launch_of(const Described& given) {
  Launch launch;
  launch.function = reinterpret_cast<void*>(std::get<0>(given));
  std::tie(launch.grid[0], launch.grid[1], launch.grid[2]) = std::get<1>(given);
  launch.threads = std::get<2>(given);
  launch.shared = std::get<3>(given);
  const auto& parameters = std::get<4>(given);
  if (parameters.size() > MOST_PARAMETERS) throw py::value_error("too many parameters");
  for (const auto& [slot, kind, value] : parameters) {
    if (slot >= SLOTS) throw py::value_error("an unknown slot");
    launch.parameters.push_back({slot, slot < 0 ? bits_of(kind, value) : 0});
  }
  return launch;
}

void add(const py::object& like, const py::object& weight, const py::object& bias, double eps, double offset,
         bool centred, int wanted, const Described& first, const std::vector<Described>& then, int64_t programs,
         uint64_t context) {
  const at::Tensor& x = THPVariable_Unpack(like.ptr());
  const auto dtype = [](const py::object& vector) {
    return vector.is_none() ? -1 : static_cast<int>(THPVariable_Unpack(vector.ptr()).scalar_type());
  };
  Key key{};
  key.columns = x.size(-1);
  key.rows = x.numel() / key.columns;
  key.eps = eps;
  key.offset = offset;
  key.device = x.device().index();
  key.dtype = static_cast<int>(x.scalar_type());
  key.weight = dtype(weight);
  key.bias = dtype(bias);
  key.wanted = wanted;
  key.centred = centred;
  auto plan = std::make_unique<Plan>();
  plan->forward = launch_of(first);
  for (const Described& each : then) plan->backward.push_back(launch_of(each));
  plan->programs = programs;
  plan->centred = centred;
  plan->records = wanted != 0;
  plan->sums_weight = wanted & 2;
  plan->sums_bias = wanted & 4;
  plan->wide = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  plan->context = reinterpret_cast<void*>(context);
  auto& place = plans[key];
  if (place) retired.push_back(std::move(place));
  place = std::move(plan);
}

void forget() {
  for (auto& [_, plan] : plans) retired.push_back(std::move(plan));
  plans.clear();
}

void connect(uint64_t launch, uint64_t stream, uint64_t set_context) {
  driver.launch = reinterpret_cast<LaunchFunction>(launch);
  driver.stream = reinterpret_cast<StreamFunction>(stream);
  driver.set_context = reinterpret_cast<ContextFunction>(set_context);
}

PyMethodDef methods[] = {
    {"norm", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(norm)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PYBIND11_MODULE(kpt_triton_norms, module) {
  module.def("connect", &connect);
  module.def("add", &add);
  module.def("forget", &forget);
  module.def("count", [] { return plans.size(); });
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
}
