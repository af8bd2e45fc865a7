//! Large buffers.

/// Buffers from this size on are asked for in large pages: two of the processors' 2 MiB ones, so
/// that at least one fits wherever the buffer begins.
const LARGE: usize = 4 << 20;

/// So many zeros. Where the system has large pages, a large buffer is made of them: writing to it
/// for the first time then takes one fault for 2 MiB and not one for 4 KiB, and reading columns
/// finds them with few entries of the translation buffers.
pub(crate) fn zeros<T: bytemuck::Zeroable + Clone>(count: usize) -> Vec<T> {
    let buffer = vec![T::zeroed(); count];
    prefer_large_pages(&buffer);
    buffer
}

/// Advice that is not taken changes nothing.
#[cfg(target_os = "linux")]
fn prefer_large_pages<T>(buffer: &[T]) {
    const PAGE: usize = 4096;
    let bytes = size_of_val(buffer);
    if bytes < LARGE {
        return;
    }
    let start = (buffer.as_ptr() as usize).next_multiple_of(PAGE);
    let end = (buffer.as_ptr() as usize + bytes) / PAGE * PAGE;
    // SAFETY: the range is whole pages within a live allocation, and this advice changes neither
    // what they hold nor who may access them. Where pages are of another size, the call fails.
    unsafe {
        libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE);
    }
}

#[cfg(not(target_os = "linux"))]
fn prefer_large_pages<T>(_: &[T]) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_of_any_size_are_zeros_that_can_be_written() {
        for count in [0, 1, 1000, LARGE / 8, LARGE / 8 + 7, LARGE] {
            let mut buffer = zeros::<f64>(count);
            assert_eq!(buffer.len(), count);
            assert!(buffer.iter().all(|value| *value == 0.0));
            buffer.fill(1.0);
            assert_eq!(buffer.iter().sum::<f64>(), count as f64);
        }
    }
}
