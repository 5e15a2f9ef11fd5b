// What the operators use of torch: its stable ABI and header-only types, nothing else, so that one
// build loads into every torch from 2.10 on (TORCH_TARGET_VERSION: newer calls do not compile).
// Include it before any header of torch.
#pragma once

#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))
#define USE_CUDA  // declares the part for CUDA, which only cuda/ calls

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace dk {

namespace stable = torch::stable;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using IntArrayRef = torch::headeronly::IntHeaderOnlyArrayRef;

template <typename T>
constexpr ScalarType scalar_type_of = torch::headeronly::CppTypeToScalarType<T>::value;

// Runs a lambda that knows the type of the activations as scalar_t.
#define DK_DISPATCH(type, name, ...)                                           \
  THO_DISPATCH_SWITCH(type, name,                                              \
                      THO_DISPATCH_CASE(ScalarType::Double, __VA_ARGS__)       \
                          THO_DISPATCH_CASE(ScalarType::Float, __VA_ARGS__)    \
                              THO_DISPATCH_CASE(ScalarType::Half, __VA_ARGS__) \
                                  THO_DISPATCH_CASE(ScalarType::BFloat16, __VA_ARGS__))

// ---- operators of ATen without a wrapper in torch/csrc/stable/ops.h -----------------------------

// Calls one by name, with all its arguments; the results come first in what is returned.
template <typename... Args>
std::array<StableIValue, sizeof...(Args)> call(const char* name, const char* overload,
                                               const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return stack;
}

inline bool is_floating_point(const Tensor& t) {
  return stable::detail::to<bool>(call("aten::is_floating_point", "", t)[0]);
}

inline Tensor as_strided(const Tensor& t, IntArrayRef sizes, IntArrayRef strides) {
  return stable::detail::to<Tensor>(
      call("aten::as_strided", "", t, sizes, strides, std::nullopt)[0]);
}

// The sorted values of a vector and where they were.
inline std::pair<Tensor, Tensor> stable_sort(const Tensor& t) {
  const auto result =
      call("aten::sort", "stable", t, std::optional<bool>(true), int64_t(0), /*descending=*/false);
  return {stable::detail::to<Tensor>(result[0]), stable::detail::to<Tensor>(result[1])};
}

// ---- tensors ------------------------------------------------------------------------------------

// Without a call where there is nothing to convert, unlike stable::to.
inline Tensor to_type(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : stable::to(t, type);
}

// On the device of another tensor.
inline Tensor empty(const Tensor& like, IntArrayRef sizes, ScalarType type, MemoryFormat format) {
  return stable::empty(sizes, type, std::nullopt, like.device(), std::nullopt, format);
}

inline Tensor zeros_like(const Tensor& t) {
  Tensor zeros = stable::empty_like(t);
  return stable::zero_(zeros);
}

// ---- error messages -----------------------------------------------------------------------------

template <typename T>
void write(std::ostream& out, const T& value) {
  out << value;
}
inline void write(std::ostream& out, ScalarType type) { out << torch::headeronly::toString(type); }
inline void write(std::ostream& out, IntArrayRef values) {
  out << '[';
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
  out << ']';
}
inline void write(std::ostream& out, const stable::Device& device) {
  using torch::headeronly::DeviceType;
  switch (device.type()) {
    case DeviceType::CPU: out << "cpu"; break;
    case DeviceType::CUDA: out << "cuda"; break;
    case DeviceType::Meta: out << "meta"; break;
    default: out << "of type " << static_cast<int>(device.type());
  }
  if (device.has_index()) out << ':' << device.index();
}

template <typename... Args>
std::string message(const Args&... args) {
  std::ostringstream out;
  (write(out, args), ...);
  return out.str();
}

}  // namespace dk

// STD_TORCH_CHECK, but for two things: sizes and devices can be part of the message, and the place
// in the source, which means nothing to a user, is not.
#define DK_CHECK(condition, ...)                                          \
  do {                                                                    \
    if (!(condition)) throw std::runtime_error(dk::message(__VA_ARGS__)); \
  } while (0)
