// dinofast._C: the C++ core as seen from Python. Arrays arrive zero-copy from `tensor.numpy()`, bfloat16 as uint16.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <utility>

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

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "C++ core of dinofast; use it through dinofast.ops.";
    m.def("dino_loss", &dino_loss, py::arg("student").noconvert(), py::arg("teacher").noconvert(),
          py::arg("center").noconvert(), py::arg("student_temp"), py::arg("teacher_temp"), py::arg("teacher_sum").noconvert(),
          py::arg("grad").noconvert(), py::arg("grad_scale"), py::arg("n_threads"),
          "Fills teacher_sum (K,) and, unless None, grad (V, B, K); returns the loss and the mean teacher entropy.");
}
