//! From tensors to the kernels' slices and back.

use std::mem::MaybeUninit;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor, WithDType};

use crate::pool;

/// Whether the fused kernels take it: f32 on the CPU.
pub(crate) fn is_cpu_f32(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}

/// Weights that no kernel packed: on the CPU in f32, as the activations are there.
pub(crate) fn unpacked(weight: &Tensor) -> Result<Tensor> {
    match weight.dtype() {
        DType::BF16 | DType::F16 if weight.device().is_cpu() => weight.to_dtype(DType::F32),
        _ => Ok(weight.clone()),
    }
}

/// One number in the place of all those of a tensor, as [`Options::sizes_only`](crate::options::Options::sizes_only) asks.
pub(crate) fn sizes_of(weight: &Tensor) -> Result<Tensor> {
    Tensor::zeros((), weight.dtype(), weight.device())?.broadcast_as(weight.shape())
}

/// The elements of a contiguous tensor.
pub(crate) fn elements<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("a tensor of shape {:?} is not contiguous: call contiguous() first", layout.shape())
    };
    Ok(&storage.as_slice::<T>()?[start..end])
}

/// What a kernel makes of its arguments.
pub(crate) type Output = Result<(Vec<f32>, Shape)>;

struct Op<F>(&'static str, F);

fn stored((data, shape): (Vec<f32>, Shape)) -> Result<(CpuStorage, Shape)> {
    Ok((CpuStorage::F32(data), shape))
}

impl<F: Fn(&CpuStorage, &Layout) -> Output> CustomOp1 for Op<F> {
    fn name(&self) -> &'static str {
        self.0
    }
    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        stored(self.1(s, l)?)
    }
}

impl<F: Fn([(&CpuStorage, &Layout); 2]) -> Output> CustomOp2 for Op<F> {
    fn name(&self) -> &'static str {
        self.0
    }
    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        stored(self.1([(s1, l1), (s2, l2)])?)
    }
}

impl<F: Fn([(&CpuStorage, &Layout); 3]) -> Output> CustomOp3 for Op<F> {
    fn name(&self) -> &'static str {
        self.0
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        stored(self.1([(s1, l1), (s2, l2), (s3, l3)])?)
    }
}

/// Runs `f` as the custom op `name` on CPU tensors; likewise the two below.
pub(crate) fn apply1(name: &'static str, x: &Tensor, f: impl Fn(&CpuStorage, &Layout) -> Output) -> Result<Tensor> {
    x.apply_op1_no_bwd(&Op(name, f))
}

pub(crate) fn apply2(
    name: &'static str,
    a: &Tensor,
    b: &Tensor,
    f: impl Fn([(&CpuStorage, &Layout); 2]) -> Output,
) -> Result<Tensor> {
    a.apply_op2_no_bwd(b, &Op(name, f))
}

pub(crate) fn apply3(
    name: &'static str,
    [a, b, c]: [&Tensor; 3],
    f: impl Fn([(&CpuStorage, &Layout); 3]) -> Output,
) -> Result<Tensor> {
    a.apply_op3_no_bwd(b, c, &Op(name, f))
}

/// A new array, `chunk` elements at a time in parallel: `fill` gets where its part begins and the part, which is
/// shorter at the end. Zeroing it first would cost as much as some of the kernels.
///
/// # Safety
/// `fill` writes every element of its part.
#[expect(unsafe_code, reason = "threads write disjoint parts of one array that nobody zeroed")]
pub(crate) unsafe fn collect_chunks(
    len: usize,
    chunk: usize,
    fill: impl Fn(usize, &mut [MaybeUninit<f32>]) + Sync,
) -> Vec<f32> {
    let mut data = Vec::with_capacity(len);
    let start = Shared(data.as_mut_ptr());
    let chunk = chunk.max(1);
    pool::run(len.div_ceil(chunk), |task| {
        let begin = task * chunk;
        let n = chunk.min(len - begin);
        // SAFETY: within the capacity, and no two tasks share an element.
        fill(begin, unsafe { std::slice::from_raw_parts_mut(start.get().add(begin).cast(), n) });
    });
    // SAFETY: the tasks have written all of it, by the contract.
    unsafe { data.set_len(len) };
    data
}

/// A pointer that threads may share because they write to different places behind it.
#[derive(Clone, Copy)]
pub(crate) struct Shared(pub(crate) *mut f32);

impl Shared {
    pub(crate) fn get(self) -> *mut f32 {
        self.0
    }
}

#[expect(unsafe_code, reason = "raw pointers are not Send by default")]
// SAFETY: whoever writes through it says why the places differ.
unsafe impl Send for Shared {}
#[expect(unsafe_code, reason = "raw pointers are not Sync by default")]
// SAFETY: as above.
unsafe impl Sync for Shared {}
