//! Bandwidth ceilings: an array far larger than the caches, walked over by all threads, each in its own part.
//!
//! Reads run over several streams at once and ask ahead for what comes, as one stream leaves memory idle whenever the
//! CPU's prefetcher stops at the end of a page. On two virtual Zen 5 CPUs, GB/s of one thread: one stream 33, two 43,
//! four with prefetch 45, sixteen 20; copies 43 by `memcpy`, 57 by stores that go past the caches. Which is best
//! differs between machines, so a few are tried and the best counts.

use std::collections::TryReserveError;
use std::hint::black_box;
use std::mem::MaybeUninit;

use super::{PeaksError, together};

/// A cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Line([u64; 8]);

pub(super) const LINE_BYTES: u64 = size_of::<Line>() as u64;

/// Lines that a stream reads before the next look at the clock (128 KiB).
const BLOCK: usize = 2048;

/// An array of at least one line per thread, each part written first by the thread that will use it, so that it lies in
/// that thread's memory on machines with several.
pub(super) fn touched(bytes: u64, threads: u32) -> Result<Vec<Line>, PeaksError> {
    let part = usize::try_from(bytes / LINE_BYTES / u64::from(threads)).unwrap_or(usize::MAX).max(1);
    let lines = part.saturating_mul(threads as usize);
    let refused = |source: TryReserveError| PeaksError::Memory { bytes, source };
    let mut array: Vec<Line> = Vec::new();
    array.try_reserve_exact(lines).map_err(refused)?;
    let spare = &mut array.spare_capacity_mut()[..lines];
    ask_for_huge_pages(spare);
    let parts = spare.chunks_mut(part).map(|part| {
        move || {
            for line in part {
                line.write(Line([1; 8]));
            }
        }
    });
    together(parts.collect())?;
    #[expect(unsafe_code, reason = "the array is written by parts in parallel")]
    // SAFETY: the parts cover all `lines`, and `together` returns Ok only after each thread has written its part.
    unsafe {
        array.set_len(lines);
    }
    Ok(array)
}

/// Large pages take the page walks out of the measurement. Where the system refuses, small ones do.
#[cfg(target_os = "linux")]
fn ask_for_huge_pages(array: &mut [MaybeUninit<Line>]) {
    const PAGE: usize = 4096;
    let skipped = array.as_ptr().align_offset(PAGE).min(array.len());
    let array = &mut array[skipped..];
    #[expect(unsafe_code, reason = "a system call on memory that this function borrows")]
    // SAFETY: the range is borrowed here, starts at a page, and MADV_HUGEPAGE leaves its contents alone.
    unsafe {
        libc::madvise(array.as_mut_ptr().cast(), size_of_val(array), libc::MADV_HUGEPAGE);
    }
}

#[cfg(not(target_os = "linux"))]
fn ask_for_huge_pages(_: &mut [MaybeUninit<Line>]) {}

/// A way to read: one worker per part of the array, which reads a block of every stream and returns the bytes read.
type Reader<'a> = Box<dyn FnMut() -> f64 + Send + 'a>;

/// Readers over 2, 4 and 8 streams.
pub(super) const READERS: [fn(&mut [Line]) -> Reader<'_>; 3] = [reader::<2>, reader::<4>, reader::<8>];

fn reader<const STREAMS: usize>(part: &mut [Line]) -> Reader<'_> {
    let length = part.len() / STREAMS;
    let part = &*part;
    let mut at = 0;
    Box::new(move || {
        let end = (at + BLOCK).min(length);
        let streams: [&[Line]; STREAMS] = std::array::from_fn(|s| &part[s * length + at..s * length + end]);
        black_box(read(streams));
        at = if end == length { 0 } else { end };
        streams.iter().map(|stream| size_of_val(*stream)).sum::<usize>() as f64
    })
}

#[cfg(target_arch = "x86_64")]
fn read<const STREAMS: usize>(streams: [&[Line]; STREAMS]) -> u64 {
    #[target_feature(enable = "avx2")]
    fn wide<const STREAMS: usize>(streams: [&[Line]; STREAMS]) -> u64 {
        fold(streams)
    }
    if std::arch::is_x86_feature_detected!("avx2") {
        #[expect(unsafe_code, reason = "calls a function compiled for AVX2")]
        // SAFETY: AVX2 was detected.
        unsafe {
            wide(streams)
        }
    } else {
        fold(streams)
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn read<const STREAMS: usize>(streams: [&[Line]; STREAMS]) -> u64 {
    fold(streams)
}

/// Reads all streams in step. Inlined, so that it is compiled for the features of its caller.
#[inline(always)]
fn fold<const STREAMS: usize>(streams: [&[Line]; STREAMS]) -> u64 {
    let length = streams.iter().map(|stream| stream.len()).min().unwrap_or(0);
    let streams = streams.map(|stream| &stream[..length]);
    let mut seen = [[0; 8]; STREAMS];
    for i in 0..length {
        for (stream, seen) in streams.iter().zip(&mut seen) {
            prefetch(&stream[i]);
            for (seen, word) in seen.iter_mut().zip(stream[i].0) {
                *seen |= word;
            }
        }
    }
    seen.as_flattened().iter().fold(0, |all, word| all | word)
}

/// Asks for what lies 1 KiB ahead; the CPU ignores an address that isn't mapped.
#[inline(always)]
fn prefetch(line: &Line) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        const AHEAD: usize = 16;
        let ahead = std::ptr::from_ref(line).wrapping_add(AHEAD);
        #[expect(unsafe_code, reason = "prefetching takes a raw pointer")]
        // SAFETY: a prefetch never faults, whatever the address.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// A way to copy lines to a place of the same length.
pub(super) type Copier = fn(&[Line], &mut [Line]);

/// The system's `memcpy`, and stores past the caches where there are such.
pub(super) fn copiers() -> Vec<Copier> {
    let plain: Copier = |from, to| to.copy_from_slice(from);
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx") {
        let past_caches: Copier = |from, to| {
            #[expect(unsafe_code, reason = "calls a function compiled for AVX")]
            // SAFETY: AVX was detected.
            unsafe {
                copy_past_caches(from, to);
            }
        };
        return vec![plain, past_caches];
    }
    vec![plain]
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
fn copy_past_caches(from: &[Line], to: &mut [Line]) {
    use std::arch::x86_64::{__m256i, _mm_sfence, _mm256_load_si256, _mm256_stream_si256};
    for (from, to) in from.iter().zip(to) {
        let from: *const __m256i = std::ptr::from_ref(from).cast();
        let to: *mut __m256i = std::ptr::from_mut(to).cast();
        #[expect(unsafe_code, reason = "streaming stores take raw pointers")]
        // SAFETY: both point to a whole line, which is two vectors, aligned to 64 bytes.
        unsafe {
            _mm256_stream_si256(to, _mm256_load_si256(from));
            _mm256_stream_si256(to.add(1), _mm256_load_si256(from.add(1)));
        }
    }
    _mm_sfence();
}

/// A worker that copies the first half of `part` to the second by blocks and returns the bytes read and written.
pub(super) fn copy_worker(part: &mut [Line], copy: Copier) -> impl FnMut() -> f64 + Send + '_ {
    let half = part.len() / 2;
    let mut at = 0;
    move || {
        let (from, to) = part.split_at_mut(half);
        let end = (at + BLOCK).min(half);
        copy(&from[at..end], &mut to[at..end]);
        black_box(&*to);
        let bytes = 2 * (end - at) as u64 * LINE_BYTES;
        at = if end == half { 0 } else { end };
        bytes as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbered(lines: usize) -> Vec<Line> {
        (0..lines as u64).map(|i| Line(std::array::from_fn(|j| i * 8 + j as u64))).collect()
    }

    #[test]
    fn first_touch_covers_every_part() {
        for threads in [1, 3] {
            let array = touched(10 * LINE_BYTES, threads).expect("a few lines");
            assert_eq!(array.len() as u32, 10 / threads * threads);
            assert!(array.iter().all(|line| line.0 == [1; 8]));
        }
        assert!(matches!(touched(u64::MAX / 2, 1), Err(PeaksError::Memory { .. })));
    }

    #[test]
    fn reads_see_every_word_of_every_stream() {
        let lines = numbered(8);
        for word in 0..64 {
            let mut lines: Vec<Line> = lines.iter().map(|_| Line([0; 8])).collect();
            lines[word / 8].0[word % 8] = 1 << word;
            assert_eq!(read([&lines[..4], &lines[4..]]), 1 << word);
            assert_eq!(fold([&lines[..2], &lines[2..4], &lines[4..6], &lines[6..]]), 1 << word);
        }
    }

    #[test]
    fn workers_go_round_and_count_their_bytes() {
        let mut lines = numbered(2 * BLOCK + 2 * 10);
        let per_round = lines.len() as f64 * LINE_BYTES as f64;
        let mut read = reader::<2>(&mut lines);
        assert_eq!(read() + read(), per_round);
        assert_eq!(read(), 2.0 * BLOCK as f64 * LINE_BYTES as f64);
        drop(read);
        for copy in copiers() {
            let mut lines = numbered(2 * BLOCK + 2 * 10);
            let mut work = copy_worker(&mut lines, copy);
            assert_eq!(work() + work(), per_round);
            drop(work);
            let (from, to) = lines.split_at(lines.len() / 2);
            assert!(from.iter().zip(to).all(|(from, to)| from.0 == to.0));
        }
    }
}
