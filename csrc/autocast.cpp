// Under autocast the activations and weights take the lower precision type; offsets keep theirs,
// since a location needs more bits than bfloat16 has.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace dk {
namespace {

template <c10::DispatchKey key, c10::DeviceType device>
at::Tensor deform_kernel_conv2d_autocast(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& kernel_offset, const std::optional<at::Tensor>& data_offset,
    c10::SymIntArrayRef kernel_size, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
    c10::SymIntArrayRef dilation, c10::SymInt groups, bool clip) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const auto type = at::autocast::get_autocast_dtype(device);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("dk_detectron::deform_kernel_conv2d", "")
                             .typed<decltype(deform_kernel_conv2d_autocast<key, device>)>();
  auto cast = [&](const at::Tensor& t) { return at::autocast::cached_cast(type, t, device); };
  return op.call(cast(input), cast(weight),
                 bias ? std::optional<at::Tensor>(cast(*bias)) : std::nullopt, kernel_offset,
                 data_offset, kernel_size, stride, padding, dilation, groups, clip);
}

}  // namespace
}  // namespace dk

TORCH_LIBRARY_IMPL(dk_detectron, AutocastCPU, m) {
  m.impl("deform_kernel_conv2d",
         &dk::deform_kernel_conv2d_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(dk_detectron, AutocastCUDA, m) {
  m.impl("deform_kernel_conv2d",
         &dk::deform_kernel_conv2d_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}
