// The ops of hf_flashattn on torch's stable ABI: the only unit that knows torch.
//
// It checks what memory safety needs (the ops can be called directly, without the Python checks),
// allocates results and workspace through torch, and fills the plain structs of params.h. One
// library serves every Python and every torch >= 2.11 (TORCH_TARGET_VERSION), CPU-only builds of
// torch included.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <tuple>
#include <utility>

#include "params.h"
#include "stream_memory.h"
#include "torch_tensors.h"

namespace hf_flashattn {
namespace {

constexpr char kForwardSchema[] =
    "forward(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? "
    "key_start, Tensor? key_len, Tensor? key_bits, Tensor? rng_state, SymInt max_seqlen_q, SymInt "
    "max_seqlen_k, float dropout_p, float softmax_scale, bool causal, bool deterministic) -> "
    "(Tensor out, Tensor lse)";

constexpr char kBackwardSchema[] =
    "backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? "
    "cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? key_start, Tensor? key_len, Tensor? key_bits, "
    "Tensor? rng_state, SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, float "
    "softmax_scale, bool causal, bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv)";

// The same for dense calls, with what is usual left out: the dispatcher's work grows with every
// argument that is given. Key bits are for graphs and are not among them.
constexpr char kDenseForwardSchema[] =
    "dense_forward(Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal=False, bool "
    "heads_first=False, Tensor? key_start=None, Tensor? key_len=None, float dropout_p=0.0, Tensor? "
    "rng_state=None, bool deterministic=False) -> (Tensor out, Tensor lse)";

// And where nobody wants the LSE: without gradients.
constexpr char kDenseInferenceSchema[] =
    "dense_inference(Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal=False, bool "
    "heads_first=False, Tensor? key_start=None, Tensor? key_len=None) -> Tensor";

constexpr char kDenseBackwardSchema[] =
    "dense_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float "
    "softmax_scale, bool causal=False, bool heads_first=False, Tensor? key_start=None, Tensor? "
    "key_len=None, float dropout_p=0.0, Tensor? rng_state=None, bool deterministic=False) "
    "-> (Tensor dq, Tensor dk, Tensor dv)";

// ---- the problem --------------------------------------------------------------------------------

void raise_if_failed(Status const& status) {
  if (!status.ok()) fail(status.message);
}

struct Call {
  Problem problem;
  Shape q, k;
  Form form;      // of q, k, v and their gradients
  Form out_form;  // of out and its gradient
  int32_t device;
  int32_t dtype;  // shim code
  bool empty;     // no row, or no key that a row could see: nothing to launch

  bool packed() const { return form == Form::kPacked; }
};

// round(256 p), but neither "never" nor "always": the kernels and the reference agree on this rule.
uint32_t drop_threshold(double p) {
  if (p == 0.0) return 0;
  int const threshold = static_cast<int>(static_cast<float>(p) * 256.f + 0.5f);
  return threshold < 1 ? 1 : threshold > 255 ? 255 : threshold;
}

// See ByteRule in common/dropout.cuh.
uint32_t drop_limit(uint32_t threshold) {
  return (threshold > 128 ? 256 - threshold : threshold) * 0x00800080u;
}

// key_bits into a problem whose shape is known.
void set_key_bits(Problem& p, OptionalTensor const& t, Tensor const& q) {
  if (!t) return;
  HFA_CHECK(p.key_start != nullptr && p.key_len != nullptr,
            "key_bits: expected key_start and key_len with it, the first key that may be seen and "
            "how many from it to the last; next step: hf_flashattn.key_bits_of(mask)");
  HFA_CHECK(t->is_cuda() && t->get_device_index() == q.get_device_index(),
            "key_bits: expected on the device of q");
  HFA_CHECK(t->scalar_type() == ScalarType::Int,
            "key_bits: expected dtype int32; next step: hf_flashattn.key_bits_of(mask)");
  int64_t const words = (int64_t{p.seqlen_k} + 31) / 32;
  HFA_CHECK(t->dim() == 2 && t->size(0) == p.batch && t->size(1) == words &&
                (words <= 1 || t->stride(1) == 1) && (p.batch <= 1 || t->stride(0) >= 0),
            "key_bits: expected contiguous words of shape (", p.batch, ", ", words, "), got ",
            shape_of(*t));
  p.key_bits = static_cast<int32_t const*>(t->data_ptr());
  p.key_bits_stride = p.batch > 1 ? t->stride(0) : words;
}

// Checks the arguments that forward and backward share. Values of device tensors are not read: the
// kernels stay inside the tensors for any content of cu_seqlens, key_start, key_len and key_bits.
Call make_call(Tensor const& q, Tensor const& k, Tensor const& v,
               OptionalTensor const& cu_seqlens_q, OptionalTensor const& cu_seqlens_k,
               OptionalTensor const& key_start, OptionalTensor const& key_len,
               OptionalTensor const& key_bits, OptionalTensor const& rng_state,
               int64_t max_seqlen_q, int64_t max_seqlen_k, double dropout_p, double softmax_scale,
               bool causal, bool heads_first) {
  HFA_CHECK(q.is_cuda(), "q: expected a CUDA tensor");
  HFA_CHECK(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(),
            "expected both cu_seqlens_q and cu_seqlens_k or none");
  Call call{};
  Problem& p = call.problem;
  call.form = cu_seqlens_q.has_value() ? Form::kPacked
              : heads_first            ? Form::kHeadsFirst
                                       : Form::kDense;
  call.out_form = call.packed() ? Form::kPacked : Form::kDense;
  call.device = q.get_device_index();
  Shape const sq = call.q = shape(q, call.form, "q");
  Shape const sk = call.k = shape(k, call.form, "k");
  Shape const sv = shape(v, call.form, "v");
  check_like(k, q, "k");
  check_like(v, q, "v");

  ScalarType const dtype = q.scalar_type();
  HFA_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
            "q: expected float16 or bfloat16 on CUDA; next step: cast, or use torch.autocast");
  p.dtype = dtype == ScalarType::Half ? DType::kFloat16 : DType::kBFloat16;
  call.dtype = dtype == ScalarType::Half ? aoti_torch_dtype_float16() : aoti_torch_dtype_bfloat16();

  HFA_CHECK(sk.batch == sv.batch && sk.seq == sv.seq && sk.heads == sv.heads && sk.dim == sv.dim,
            "expected k and v of one shape, got ", shape_of(k), " and ", shape_of(v));
  HFA_CHECK(sq.batch == sk.batch, "expected one batch size, got q ", shape_of(q), " and k ",
            shape_of(k));
  HFA_CHECK(sq.dim == sk.dim && sq.dim > 0, "expected one head_dim, got q ", shape_of(q), " and k ",
            shape_of(k));
  HFA_CHECK(sq.heads > 0 && sk.heads > 0 && sq.heads % sk.heads == 0,
            "expected heads of q to be a multiple of heads of k, got ", sq.heads, " and ",
            sk.heads);
  HFA_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, "dropout_p: expected 0 <= p < 1, got ", dropout_p);
  HFA_CHECK(dropout_p == 0.0 || rng_state.has_value(),
            "dropout_p > 0 needs rng_state, int64 (2,) on the device of q");
  HFA_CHECK(std::isfinite(softmax_scale), "softmax_scale: expected a finite number, got ",
            softmax_scale);

  int64_t batch = sq.batch;
  if (call.packed()) {
    HFA_CHECK(cu_seqlens_q->dim() == 1 && cu_seqlens_q->size(0) >= 1,
              "cu_seqlens_q: expected shape (batch + 1,), got ", shape_of(*cu_seqlens_q));
    HFA_CHECK(!key_start && !key_len && !key_bits,
              "key_start, key_len and key_bits: expected None with cu_seqlens, which says the "
              "lengths");
    batch = cu_seqlens_q->size(0) - 1;
    HFA_CHECK(sq.seq == 0 || batch == 0 || max_seqlen_q > 0,
              "max_seqlen_q: expected at least 1, got ", max_seqlen_q);
    HFA_CHECK(sk.seq == 0 || batch == 0 || max_seqlen_k >= 0,
              "max_seqlen_k: expected at least 0, got ", max_seqlen_k);
    p.seqlen_q = to_int32(max_seqlen_q < sq.seq ? max_seqlen_q : sq.seq, "max_seqlen_q");
    p.seqlen_k = to_int32(max_seqlen_k < sk.seq ? max_seqlen_k : sk.seq, "max_seqlen_k");
  } else {
    p.seqlen_q = to_int32(sq.seq, "seqlen of q");
    p.seqlen_k = to_int32(sk.seq, "seqlen of k");
  }
  p.cu_seqlens_q = index_data(cu_seqlens_q, q, batch + 1, "cu_seqlens_q");
  p.cu_seqlens_k = index_data(cu_seqlens_k, q, batch + 1, "cu_seqlens_k");
  p.key_start = index_data(key_start, q, batch, "key_start");
  p.key_len = index_data(key_len, q, batch, "key_len");

  p.batch = to_int32(batch, "batch");
  p.heads_q = to_int32(sq.heads, "heads of q");
  p.heads_k = to_int32(sk.heads, "heads of k");
  p.head_dim = to_int32(sq.dim, "head_dim");
  p.total_q = to_int32(sq.batch * sq.seq, "tokens of q");
  p.total_k = to_int32(sk.batch * sk.seq, "tokens of k");
  set_key_bits(p, key_bits, q);
  p.softmax_scale = static_cast<float>(softmax_scale);
  p.causal = causal;
  p.drop_threshold = drop_threshold(dropout_p);
  p.drop_limit = drop_limit(p.drop_threshold);
  if (dropout_p > 0.0) {
    HFA_CHECK(rng_state->is_cuda() && rng_state->get_device_index() == call.device &&
                  rng_state->scalar_type() == ScalarType::Long && rng_state->dim() == 1 &&
                  rng_state->size(0) == 2 && rng_state->is_contiguous(),
              "rng_state: expected int64 (2,) on the device of q, got ", shape_of(*rng_state));
    p.rng_state = static_cast<int64_t const*>(rng_state->data_ptr());
  }
  call.empty = batch == 0 || sq.seq == 0 || sk.seq == 0 || p.seqlen_k == 0;
  DeviceInfo const info = device_info(call.device);
  p.device = call.device;
  p.compute_capability = info.compute_capability;
  p.num_sms = info.num_sms;
  if (call.empty) raise_if_failed(check_supported(p));
  else p.stream = current_stream(call.device);
  return call;
}

// The view of a tensor of any strides, such as a gradient (a sum's is expanded): copied if TMA
// cannot load it; `t` then holds the copy, which must live until the launch.
TensorView copied_view(Tensor& t, Shape const& s, Form form) {
  Layout l = layout(t, s, form);
  if (!l.loadable) {
    t = t.is_contiguous() ? torch::stable::clone(t) : torch::stable::contiguous(t);
    l = layout(t, s, form);
  }
  return l.view;
}

// The view of an input: refused if TMA cannot load it, unless it was expanded, for TMA wants other
// strides than 0. With heads first it is a model's, who cannot be asked for another: copied.
TensorView input_view(Call const& call, Tensor& t, Shape const& s, char const* name) {
  if (call.form != Form::kHeadsFirst) {
    Layout const l = layout(t, s, call.form);
    auto const& v = l.view;
    bool const expanded = v.stride_seq == 0 || v.stride_head == 0 || v.stride_batch == 0;
    HFA_CHECK(l.loadable || expanded, name,
              ": expected head_dim contiguous, other strides multiples of 8 elements, data aligned "
              "to 16 bytes; "
              "next step: ",
              name, ".contiguous()");
  }
  return copied_view(t, s, call.form);
}

// ---- ops ----------------------------------------------------------------------------------------

// lse: of all rows, contiguous; undefined if nobody wants it. Returns out.
Tensor run_forward(Call const& call, Tensor& q, Tensor& k, Tensor& v, Tensor lse) {
  Tensor out = empty_like(call.q, call.out_form, call.dtype, call.device);
  if (call.empty) {
    torch::stable::zero_(out);
    if (lse.defined()) torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
    return out;
  }
  ForwardParams params{};
  params.problem = call.problem;
  params.q = input_view(call, q, call.q, "q");
  params.k = input_view(call, k, call.k, "k");
  params.v = input_view(call, v, call.k, "v");
  params.out = layout(out, call.q, call.out_form).view;
  bool const claims = forward_claims_tiles(call.problem);
  auto const stream = static_cast<cudaStream_t>(call.problem.stream);
  StreamMemory* const memory =
      claims || !lse.defined() ? StreamMemory::of(call.device, stream) : nullptr;
  // What is this call's alone, as these may be, is given back in the order of the stream: after the
  // kernel.
  if (!lse.defined()) {
    int64_t const floats = call.q.batch * call.q.heads * call.q.seq;
    lse = memory != nullptr ? memory->unread(floats)
                            : empty({floats}, aoti_torch_dtype_float32(), call.device);
  }
  params.lse = static_cast<float*>(lse.data_ptr());
  std::optional<Tensor> own_counter;
  raise_if_failed(launch_forward(
      params, claims ? counter_of_call(memory, call.device, stream, own_counter) : nullptr));
  return out;
}

std::tuple<Tensor, Tensor> forward_with_lse(Call const& call, Tensor& q, Tensor& k, Tensor& v) {
  OnDevice const guard(call.device);
  int32_t const fp32 = aoti_torch_dtype_float32();
  Tensor lse = call.packed() ? empty({call.q.heads, call.q.seq}, fp32, call.device)
                             : empty({call.q.batch, call.q.heads, call.q.seq}, fp32, call.device);
  return {run_forward(call, q, k, v, lse), lse};
}

std::tuple<Tensor, Tensor, Tensor> run_backward(Call const& call, Tensor& dout, Tensor& q,
                                                Tensor& k, Tensor& v, Tensor& out, Tensor& lse,
                                                bool deterministic) {
  for (auto const& [t, name] :
       {std::pair<Tensor const&, char const*>{dout, "dout"}, {out, "out"}}) {
    check_like(t, q, name);
    Shape const s = shape(t, call.out_form, name);
    HFA_CHECK(s.batch == call.q.batch && s.seq == call.q.seq && s.heads == call.q.heads &&
                  s.dim == call.q.dim,
              name, ": expected the shape of q ", shape_of(q), ", got ", shape_of(t));
  }
  HFA_CHECK(lse.is_cuda() && lse.get_device_index() == call.device &&
                lse.scalar_type() == ScalarType::Float && lse.is_contiguous() &&
                lse.numel() == call.q.batch * call.q.heads * call.q.seq,
            "lse: expected what forward returned (float32, contiguous), got shape ", shape_of(lse));

  OnDevice const guard(call.device);
  Tensor dq = empty_like(call.q, call.form, call.dtype, call.device);
  Tensor dk = empty_like(call.k, call.form, call.dtype, call.device);
  Tensor dv = empty_like(call.k, call.form, call.dtype, call.device);
  if (call.empty) {
    for (Tensor* grad : {&dq, &dk, &dv}) torch::stable::zero_(*grad);
    return {dq, dk, dv};
  }
  BackwardParams params{};
  params.problem = call.problem;
  params.dout = copied_view(dout, call.q, call.out_form);
  params.q = input_view(call, q, call.q, "q");
  params.k = input_view(call, k, call.k, "k");
  params.v = input_view(call, v, call.k, "v");
  params.out = copied_view(out, call.q, call.out_form);
  params.dq = layout(dq, call.q, call.form).view;
  params.dk = layout(dk, call.k, call.form).view;
  params.dv = layout(dv, call.k, call.form).view;
  params.lse = static_cast<float const*>(lse.data_ptr());
  params.deterministic = deterministic;
  // torch's allocations are aligned to 512 bytes, more than the kernels ask for.
  int64_t const bytes = static_cast<int64_t>(backward_workspace_bytes(params));
  Tensor const workspace = empty({bytes}, aoti_torch_dtype_uint8(), call.device);
  params.workspace = workspace.data_ptr();
  raise_if_failed(launch_backward(params));
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, OptionalTensor cu_seqlens_q,
                                   OptionalTensor cu_seqlens_k, OptionalTensor key_start,
                                   OptionalTensor key_len, OptionalTensor key_bits,
                                   OptionalTensor rng_state, int64_t max_seqlen_q,
                                   int64_t max_seqlen_k, double dropout_p, double softmax_scale,
                                   bool causal, bool /*deterministic*/) {
  Call const call =
      make_call(q, k, v, cu_seqlens_q, cu_seqlens_k, key_start, key_len, key_bits, rng_state,
                max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, false);
  return forward_with_lse(call, q, k, v);
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out,
                                            Tensor lse, OptionalTensor cu_seqlens_q,
                                            OptionalTensor cu_seqlens_k, OptionalTensor key_start,
                                            OptionalTensor key_len, OptionalTensor key_bits,
                                            OptionalTensor rng_state, int64_t max_seqlen_q,
                                            int64_t max_seqlen_k, double dropout_p,
                                            double softmax_scale, bool causal, bool deterministic) {
  Call const call =
      make_call(q, k, v, cu_seqlens_q, cu_seqlens_k, key_start, key_len, key_bits, rng_state,
                max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, false);
  return run_backward(call, dout, q, k, v, out, lse, deterministic);
}

std::tuple<Tensor, Tensor> dense_forward(Tensor q, Tensor k, Tensor v, double softmax_scale,
                                         bool causal, bool heads_first, OptionalTensor key_start,
                                         OptionalTensor key_len, double dropout_p,
                                         OptionalTensor rng_state, bool /*deterministic*/) {
  Call const call = make_call(q, k, v, {}, {}, key_start, key_len, {}, rng_state, 0, 0, dropout_p,
                              softmax_scale, causal, heads_first);
  return forward_with_lse(call, q, k, v);
}

Tensor dense_inference(Tensor q, Tensor k, Tensor v, double softmax_scale, bool causal,
                       bool heads_first, OptionalTensor key_start, OptionalTensor key_len) {
  Call const call = make_call(q, k, v, {}, {}, key_start, key_len, {}, {}, 0, 0, 0.0, softmax_scale,
                              causal, heads_first);
  OnDevice const guard(call.device);
  return run_forward(call, q, k, v, {});
}

std::tuple<Tensor, Tensor, Tensor> dense_backward(Tensor dout, Tensor q, Tensor k, Tensor v,
                                                  Tensor out, Tensor lse, double softmax_scale,
                                                  bool causal, bool heads_first,
                                                  OptionalTensor key_start, OptionalTensor key_len,
                                                  double dropout_p, OptionalTensor rng_state,
                                                  bool deterministic) {
  Call const call = make_call(q, k, v, {}, {}, key_start, key_len, {}, rng_state, 0, 0, dropout_p,
                              softmax_scale, causal, heads_first);
  return run_backward(call, dout, q, k, v, out, lse, deterministic);
}

// True if this process's Python has already defined the schemas, because the library was not there
// yet when hf_flashattn was imported (see hf_flashattn/ops.py). The value is the process id, so
// that a child that inherits the environment is not misled.
bool schemas_are_defined() {
  char const* const pid = std::getenv("HF_FLASHATTN_SCHEMAS_DEFINED_BY");
  return pid != nullptr && std::strtol(pid, nullptr, 10) == static_cast<long>(getpid());
}

}  // namespace
}  // namespace hf_flashattn

STABLE_TORCH_LIBRARY_FRAGMENT(hf_flashattn, library) {
  if (hf_flashattn::schemas_are_defined()) return;
  library.def(hf_flashattn::kForwardSchema);
  library.def(hf_flashattn::kBackwardSchema);
  library.def(hf_flashattn::kDenseForwardSchema);
  library.def(hf_flashattn::kDenseBackwardSchema);
  library.def(hf_flashattn::kDenseInferenceSchema);
}

STABLE_TORCH_LIBRARY_IMPL(hf_flashattn, CUDA, library) {
  library.impl("forward", TORCH_BOX(&hf_flashattn::forward));
  library.impl("backward", TORCH_BOX(&hf_flashattn::backward));
  library.impl("dense_forward", TORCH_BOX(&hf_flashattn::dense_forward));
  library.impl("dense_backward", TORCH_BOX(&hf_flashattn::dense_backward));
  library.impl("dense_inference", TORCH_BOX(&hf_flashattn::dense_inference));
}
