// dinofast._C: the C++ core as seen from Python.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/adamw_ema.h"
#include "cpu/dino_loss.h"
#include "cpu/multicrop.h"
#include "cpu/recycled.h"

namespace py = pybind11;
using dinofast::Dtype;
using Floats = py::array_t<float, py::array::c_style>;

namespace {

// Tensors come as addresses, which `ops` has checked: an array costs 1 us to make and to take apart again.
using Addresses = std::vector<uintptr_t>;
using Dtypes = std::vector<int>;
using Sizes = std::vector<int64_t>;

template <class... Lists>
void check_lengths(size_t n, int n_threads, const Lists&... lists) {
    if (((lists.size() != n) || ...) || n_threads < 1) throw std::invalid_argument("lists must be of one length");
}

template <class T = float>
T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

// dtypes: 0 float32, 1 bfloat16, 2 float16
dinofast::Numbers numbers(uintptr_t address, int dtype) {
    return {at<const void>(address), static_cast<Dtype>(dtype)};
}

dinofast::Logits logits(uintptr_t address, int dtype, std::pair<int64_t, int64_t> strides) {
    return {at<void>(address), static_cast<Dtype>(dtype), strides.first, strides.second};
}

std::pair<double, double> dino_loss(uintptr_t student, int student_dtype, std::pair<int64_t, int64_t> student_strides,
                                    uintptr_t teacher, int teacher_dtype, std::pair<int64_t, int64_t> teacher_strides,
                                    std::optional<uintptr_t> center, std::tuple<int64_t, int64_t, int64_t, int64_t> sizes,
                                    double student_temp, double teacher_temp, double terms, bool diagonal,
                                    std::optional<uintptr_t> teacher_sum, std::optional<uintptr_t> grad, double grad_scale,
                                    bool streamed, int n_threads) {
    const auto [V, T, B, K] = sizes;
    if (V < 1 || T < 1 || B < 1 || K < 1 || n_threads < 1) throw std::invalid_argument("sizes must be above 0");
    for (const std::optional<uintptr_t>& address : {std::optional(student), std::optional(teacher), center, teacher_sum, grad})
        if (address == 0) throw std::invalid_argument("a tensor has no memory");  // a wrapper, which has no address
    py::gil_scoped_release release;
    const auto sums = dinofast::dino_loss(logits(student, student_dtype, student_strides),
                                          logits(teacher, teacher_dtype, teacher_strides), at<const float>(center.value_or(0)),
                                          {V, T, B, K}, {student_temp, teacher_temp, terms, diagonal, grad_scale, streamed},
                                          at(teacher_sum.value_or(0)), at<void>(grad.value_or(0)), n_threads);
    return {sums.loss, sums.entropy};
}

constexpr int32_t kLargestCrop = 1 << 14;  // pixels, as in dinofast/config.py

void multicrop(const py::array_t<uint8_t, py::array::c_style>& image, const py::array& views, const Addresses& crops, int kind,
               const std::optional<Floats>& norm_lut) {
    using dinofast::Levels;
    if (image.ndim() != 3 || (image.shape(2) != 3 && image.shape(2) != 4))
        throw std::invalid_argument("image must be (height, width, 3 or 4)");
    if (views.itemsize() != sizeof(dinofast::View) || views.ndim() != 1 || !(views.flags() & py::array::c_style) ||
        uintptr_t(views.data()) % alignof(dinofast::View) || size_t(views.size()) != crops.size())
        throw std::invalid_argument("views must be as many as crops, one after the other, of data.augmentation.VIEW");
    const bool has_levels = norm_lut && norm_lut->ndim() == 2 && norm_lut->shape(0) == 3 && norm_lut->shape(1) == 256;
    if (kind < 0 || kind > 2 || (kind && !has_levels))
        throw std::invalid_argument("norm_lut must be (3, 256)");
    const auto* drawn = static_cast<const dinofast::View*>(views.data());
    for (size_t i = 0; i < crops.size(); ++i) {  // any bytes may come: what passes here is safe to execute
        const int64_t y = drawn[i].box[0], x = drawn[i].box[1], h = drawn[i].box[2], w = drawn[i].box[3];
        if (y < 0 || x < 0 || h < 1 || w < 1 || y + h > image.shape(0) || x + w > image.shape(1) || drawn[i].size < 1)
            throw std::invalid_argument("a box does not lie in the image");
        if (drawn[i].size > kLargestCrop) throw std::invalid_argument("a crop is larger than 16384");
        for (int k = 0; drawn[i].jitter && k < 4; ++k) {
            if (drawn[i].order[k] > 3) throw std::invalid_argument("an order names a color operation beyond 3");
            if (!(std::fabs(drawn[i].factors[k]) < 1000)) throw std::invalid_argument("a color factor is beyond 1000");
        }
        if (!(drawn[i].blur_radius >= 0 && drawn[i].blur_radius < 1000)) throw std::invalid_argument("a blur radius is beyond 1000");
        if (!crops[i]) throw std::invalid_argument("a crop has no memory");
    }
    std::vector<void*> places;
    for (const uintptr_t address : crops) places.push_back(at<void>(address));
    const Levels levels{static_cast<Levels::Kind>(kind), norm_lut ? norm_lut->data() : nullptr};
    py::gil_scoped_release release;
    dinofast::multicrop(image.data(), image.shape(0), image.shape(1), image.shape(2), drawn, int64_t(places.size()), levels,
                        places.data());
}

struct ArrowArray {  // as the Arrow C data interface lays it out
    int64_t length, null_count, offset, n_buffers, n_children;
    const void** buffers;
    ArrowArray** children;
    ArrowArray* dictionary;
    void (*release)(ArrowArray*);
    void* private_data;
};

py::array_t<uint8_t> arrow_view(const py::capsule& owner, int64_t height, int64_t width) {
    if (std::strcmp(owner.name() ? owner.name() : "", "arrow_array")) throw std::invalid_argument("not an Arrow array");
    const auto* array = owner.get_pointer<ArrowArray>();
    if (!array->release || array->offset || array->length != height * width || array->n_children != 1)
        throw std::invalid_argument("not one pixel after the other");
    const ArrowArray& bytes = **array->children;
    if (bytes.offset || bytes.n_buffers != 2 || bytes.length != 4 * height * width)
        throw std::invalid_argument("not of 4 bytes a pixel");
    py::array_t<uint8_t> pixels({height, width, int64_t(4)}, static_cast<const uint8_t*>(bytes.buffers[1]), owner);
    pixels.attr("setflags")(py::arg("write") = false);
    return pixels;
}

py::array_t<uint8_t> empty(size_t bytes) {
    void* data = dinofast::Recycled::take(bytes);
    auto* block = new std::pair<void*, size_t>(data, bytes);
    return {{bytes}, {size_t(1)}, static_cast<const uint8_t*>(data), py::capsule(block, [](void* p) {
        auto* block = static_cast<std::pair<void*, size_t>*>(p);
        dinofast::Recycled::give_back(block->first, block->second);
        delete block;
    })};
}

dinofast::Copy copy(uintptr_t address, int dtype) { return {at<void>(address), static_cast<Dtype>(dtype)}; }

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
        tensors.push_back({at(params[i]), numbers(grads[i], grad_dtypes[i]), at(exp_avgs[i]), at(exp_avg_sqs[i]),
                           at(teachers[i]), copy(param_copies[i], param_copy_dtypes[i]),
                           copy(teacher_copies[i], teacher_copy_dtypes[i]), at(steps[i]), sizes[i],
                           coefficients.data()[i]});
    py::gil_scoped_release release;
    dinofast::adamw_ema(tensors, {lr, weight_decay, beta1, beta2, eps, momentum}, n_threads);
}

void ema(const Addresses& teachers, const Addresses& students, const Dtypes& student_dtypes, const Addresses& copies,
         const Dtypes& copy_dtypes, const Sizes& sizes, double momentum, int n_threads) {
    check_lengths(teachers.size(), n_threads, students, student_dtypes, copies, copy_dtypes, sizes);
    std::vector<dinofast::EmaTensor> tensors;
    for (size_t i = 0; i < teachers.size(); ++i)
        tensors.push_back({at(teachers[i]), numbers(students[i], student_dtypes[i]), copy(copies[i], copy_dtypes[i]),
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
    m.def("dino_loss", &dino_loss, py::arg("student"), py::arg("student_dtype"), py::arg("student_strides"), py::arg("teacher"),
          py::arg("teacher_dtype"), py::arg("teacher_strides"), py::arg("center"), py::arg("sizes"), py::arg("student_temp"),
          py::arg("teacher_temp"), py::arg("terms"), py::arg("diagonal"), py::arg("teacher_sum"), py::arg("grad"),
          py::arg("grad_scale"), py::arg("streamed"), py::arg("n_threads"),
          "Fills teacher_sum (K,) and grad (V, B, K) unless None; returns the loss and the mean teacher entropy.");
    m.def("multicrop", &multicrop, py::arg("image").noconvert(), py::arg("views"), py::arg("crops"), py::arg("kind"),
          py::arg("norm_lut").noconvert(),
          "All crops of an image; kind: 0 uint8, 1 float32, 2 bfloat16, the last two by norm_lut.");
    m.def("arrow_view", &arrow_view, py::arg("arrow_array"), py::arg("height"), py::arg("width"),
          "Pixels (height, width, 4) in the memory of their owner, which stays until the array has gone.");
    m.def("empty", &empty, py::arg("bytes"), "Memory for a large result, that of an earlier one where the size is the same.");
    m.attr("large") = dinofast::kLarge;
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
