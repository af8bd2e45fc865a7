//! Products of strided matrices in f32 and f64.

/// A number type whose products are computed.
pub(crate) trait Multiply: Copy + 'static {
    /// `output = left · rightᵀ`, both over the same depth: the value of row i and column j goes to
    /// `output[j * stride + i]`. One thread computes it.
    fn multiply(left: View<'_, Self>, right: View<'_, Self>, output: &mut [Self], stride: usize);
}

/// Vectors of one length within a slice: value d of vector i is `data[first + d·depth_step + i·step]`.
#[derive(Clone, Copy)]
pub(crate) struct View<'a, T> {
    pub data: &'a [T],
    pub first: usize,
    pub depth: usize,
    pub depth_step: usize,
    pub count: usize,
    pub step: usize,
}

impl<T> View<'_, T> {
    /// Whether every value lies in the slice.
    fn is_inside(&self) -> bool {
        let last = |count: usize, step: usize| (count - 1).checked_mul(step);
        if self.depth == 0 || self.count == 0 {
            return true;
        }
        let ends = last(self.depth, self.depth_step).zip(last(self.count, self.step));
        let end = ends.and_then(|(one, other)| one.checked_add(other)?.checked_add(self.first));
        end.is_some_and(|end| end < self.data.len())
    }
}

macro_rules! multiply {
    ($type:ty, $function:path) => {
        impl Multiply for $type {
            fn multiply(
                left: View<'_, Self>,
                right: View<'_, Self>,
                output: &mut [Self],
                stride: usize,
            ) {
                let (rows, columns) = (left.count, right.count);
                if rows == 0 || columns == 0 {
                    return;
                }
                assert_eq!(left.depth, right.depth, "both sides run over one extent");
                assert!(left.is_inside() && right.is_inside(), "views of what is there");
                assert!(rows <= stride, "columns do not overlap");
                assert!((columns - 1) * stride + rows <= output.len(), "room for each value");
                let left_start = left.data[left.first.min(left.data.len())..].as_ptr();
                let right_start = right.data[right.first.min(right.data.len())..].as_ptr();
                // SAFETY: by the assertions, the steps reach every element of the two views and
                // of the output's rows and columns, and none outside of the three slices; the
                // output is not read (`read_dst` is false) and is borrowed mutably, so that it
                // overlaps neither side.
                unsafe {
                    $function()(
                        rows,
                        columns,
                        left.depth,
                        output.as_mut_ptr(),
                        stride as isize,
                        1,
                        false,
                        left_start,
                        left.depth_step as isize,
                        left.step as isize,
                        right_start,
                        right.step as isize,
                        right.depth_step as isize,
                        0.0,
                        1.0,
                        false,
                        false,
                        false,
                        // Whole tiles are spread over the caller's threads.
                        gemm_common::Parallelism::None,
                    );
                }
            }
        }
    };
}

multiply!(f32, gemm_f32::gemm::f32::get_gemm_fn);
multiply!(f64, gemm_f64::gemm::f64::get_gemm_fn);
