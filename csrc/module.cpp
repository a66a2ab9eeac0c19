// dinofast._C: the C++ core as seen from Python. Arrays arrive zero-copy from `tensor.numpy()`, bfloat16 as uint16.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cpu/adamw_ema.h"
#include "cpu/dino_loss.h"

namespace py = pybind11;
using dinofast::Dtype;
using Floats = py::array_t<float, py::array::c_style>;

namespace {

Dtype dtype_of(const py::array& array) {
    const char kind = array.dtype().kind();
    if (kind == 'f' && array.itemsize() == 4) return Dtype::f32;
    if (kind == 'f' && array.itemsize() == 2) return Dtype::f16;
    if (kind == 'u' && array.itemsize() == 2) return Dtype::bf16;
    throw std::invalid_argument("logits must be float32, float16 or bfloat16 seen as uint16");
}

dinofast::Logits logits(const py::array& array) {
    if (array.ndim() != 3 || (array.shape(2) > 1 && array.strides(2) != array.itemsize()))
        throw std::invalid_argument("logits must have three axes, the last one contiguous");
    return {array.data(), dtype_of(array), array.strides(0) / array.itemsize(), array.strides(1) / array.itemsize()};
}

std::pair<double, double> dino_loss(const py::array& student, const py::array& teacher, const Floats& center,
                                    double student_temp, double teacher_temp, Floats& teacher_sum,
                                    std::optional<py::array> grad, double grad_scale, int n_threads) {
    const auto s = logits(student), t = logits(teacher);
    const auto V = student.shape(0), B = student.shape(1), K = student.shape(2);
    if (V < 2 || B < 1 || K < 1 || teacher.shape(0) != 2 || teacher.shape(1) != B || teacher.shape(2) != K ||
        center.ndim() != 1 || center.size() != K || teacher_sum.size() != K || n_threads < 1)
        throw std::invalid_argument("shapes must be student (V, B, K), teacher (2, B, K), center (K,), teacher_sum (K,)");
    if (grad && (grad->size() != student.size() || !(grad->flags() & py::array::c_style) || dtype_of(*grad) != s.dtype))
        throw std::invalid_argument("grad must be contiguous, with the shape and dtype of student");
    void* grad_data = grad ? grad->mutable_data() : nullptr;
    float* sum_data = teacher_sum.mutable_data();
    py::gil_scoped_release release;
    const auto sums = dinofast::dino_loss(s, t, center.data(), V, B, K, student_temp, teacher_temp, sum_data, grad_data,
                                          grad_scale, n_threads);
    return {sums.loss, sums.entropy};
}

// Many tensors at once come as lists of addresses, which `ops` has checked: an array for each would cost 1 us a tensor.
using Addresses = std::vector<uintptr_t>;
using Dtypes = std::vector<int>;
using Sizes = std::vector<int64_t>;

template <class... Lists>
void check_lengths(size_t n, int n_threads, const Lists&... lists) {
    if (((lists.size() != n) || ...) || n_threads < 1) throw std::invalid_argument("lists must be of one length");
}

float* floats(uintptr_t address) { return reinterpret_cast<float*>(address); }

// dtypes: 0 float32, 1 bfloat16, 2 float16
dinofast::Numbers numbers(uintptr_t address, int dtype) {
    return {reinterpret_cast<const void*>(address), static_cast<Dtype>(dtype)};
}

dinofast::Copy copy(uintptr_t address, int dtype) { return {reinterpret_cast<void*>(address), static_cast<Dtype>(dtype)}; }

void adamw_ema(const Addresses& params, const Addresses& grads, const Dtypes& grad_dtypes, const Addresses& exp_avgs,
               const Addresses& exp_avg_sqs, const Addresses& steps, const Addresses& teachers, const Addresses& param_copies,
               const Dtypes& param_copy_dtypes, const Addresses& teacher_copies, const Dtypes& teacher_copy_dtypes,
               const Sizes& sizes, const Floats& coefficients, double lr, double weight_decay, double beta1, double beta2,
               double eps, double momentum, int n_threads) {
    const size_t n = params.size();
    check_lengths(n, n_threads, grads, grad_dtypes, exp_avgs, exp_avg_sqs, steps, teachers, param_copies, param_copy_dtypes,
                  teacher_copies, teacher_copy_dtypes, sizes);
    if (coefficients.size() != py::ssize_t(n)) throw std::invalid_argument("coefficients must be (n,)");
    std::vector<dinofast::AdamwTensor> tensors;
    for (size_t i = 0; i < n; ++i)
        tensors.push_back({floats(params[i]), numbers(grads[i], grad_dtypes[i]), floats(exp_avgs[i]), floats(exp_avg_sqs[i]),
                           floats(teachers[i]), copy(param_copies[i], param_copy_dtypes[i]),
                           copy(teacher_copies[i], teacher_copy_dtypes[i]), floats(steps[i]), sizes[i],
                           coefficients.data()[i]});
    py::gil_scoped_release release;
    dinofast::adamw_ema(tensors, {lr, weight_decay, beta1, beta2, eps, momentum}, n_threads);
}

void ema(const Addresses& teachers, const Addresses& students, const Dtypes& student_dtypes, const Addresses& copies,
         const Dtypes& copy_dtypes, const Sizes& sizes, double momentum, int n_threads) {
    check_lengths(teachers.size(), n_threads, students, student_dtypes, copies, copy_dtypes, sizes);
    std::vector<dinofast::EmaTensor> tensors;
    for (size_t i = 0; i < teachers.size(); ++i)
        tensors.push_back({floats(teachers[i]), numbers(students[i], student_dtypes[i]), copy(copies[i], copy_dtypes[i]),
                           sizes[i]});
    py::gil_scoped_release release;
    dinofast::ema(tensors, momentum, n_threads);
}

void grad_norms(const Addresses& grads, const Dtypes& dtypes, const Sizes& sizes, Floats& norms, int n_threads) {
    check_lengths(grads.size(), n_threads, dtypes, sizes);
    if (norms.size() != py::ssize_t(grads.size())) throw std::invalid_argument("norms must be (n,)");
    std::vector<dinofast::GradTensor> tensors;
    for (size_t i = 0; i < grads.size(); ++i) tensors.push_back({numbers(grads[i], dtypes[i]), sizes[i]});
    float* out = norms.mutable_data();
    py::gil_scoped_release release;
    dinofast::grad_norms(tensors, out, n_threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "C++ core of dinofast; use it through dinofast.ops.";
    m.def("dino_loss", &dino_loss, py::arg("student").noconvert(), py::arg("teacher").noconvert(),
          py::arg("center").noconvert(), py::arg("student_temp"), py::arg("teacher_temp"), py::arg("teacher_sum").noconvert(),
          py::arg("grad").noconvert(), py::arg("grad_scale"), py::arg("n_threads"),
          "Fills teacher_sum (K,) and, unless None, grad (V, B, K); returns the loss and the mean teacher entropy.");
    m.def("adamw_ema_", &adamw_ema, py::arg("params"), py::arg("grads"), py::arg("grad_dtypes"), py::arg("exp_avgs"),
          py::arg("exp_avg_sqs"), py::arg("steps"), py::arg("teachers"), py::arg("param_copies"), py::arg("param_copy_dtypes"),
          py::arg("teacher_copies"), py::arg("teacher_copy_dtypes"), py::arg("sizes"), py::arg("coefficients").noconvert(),
          py::arg("lr"), py::arg("weight_decay"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("momentum"),
          py::arg("n_threads"),
          "AdamW and the teacher's average on n tensors, given by address; a teacher and a rounded copy may be 0.");
    m.def("ema_", &ema, py::arg("teachers"), py::arg("students"), py::arg("student_dtypes"), py::arg("copies"),
          py::arg("copy_dtypes"), py::arg("sizes"), py::arg("momentum"), py::arg("n_threads"),
          "The teacher's average on n tensors, given by address; a rounded copy may be 0.");
    m.def("grad_norms", &grad_norms, py::arg("grads"), py::arg("dtypes"), py::arg("sizes"), py::arg("norms").noconvert(),
          py::arg("n_threads"), "Fills norms (n,) with the L2 norm of each of n tensors, given by address.");
}
