//! Safetensors files, mapped into memory: 8 bytes of header length, a JSON header, the tensors back to back.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use candle_core::safetensors::Load;
use candle_core::{Device, Tensor};
use memmap2::Mmap;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde::Deserialize;
use serde_json::Value;

use super::{Stored, elements};
use crate::weights::WeightsError;

/// The format's own limit.
const LARGEST_HEADER: usize = 100_000_000;

#[derive(Debug)]
pub(super) struct SafetensorsFile {
    path: PathBuf,
    map: Mmap,
    data_start: usize,
    tensors: BTreeMap<String, Stored>,
    offsets: BTreeMap<String, (usize, usize)>,
}

/// What the header says of a tensor. The type stays text: an unknown one matters only when the tensor is asked for.
#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

impl SafetensorsFile {
    pub(super) fn open(path: &Path, file: &File) -> Result<Self, WeightsError> {
        let io = |source| WeightsError::Io { file: path.to_owned(), source };
        let damaged = |reason| WeightsError::Damaged { file: path.to_owned(), reason };
        let length = file.metadata().map_err(io)?.len();
        if length < 8 {
            return Err(damaged(format!("{length} bytes, too short for the length of a header")));
        }
        #[expect(unsafe_code, reason = "a checkpoint is mapped, so that it need not fit in memory twice")]
        // SAFETY: the map is only read, through bounds-checked slices. As with every mapped file, another process that
        // shortens it while we read ends this process with SIGBUS; checkpoints are written once and then left alone.
        let map = unsafe { Mmap::map(file) }.map_err(io)?;
        let (header, data_start) = header(&map).map_err(damaged)?;
        let (tensors, offsets) = entries(header, map.len() - data_start).map_err(damaged)?;
        Ok(Self { path: path.to_owned(), map, data_start, tensors, offsets })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn bytes(&self) -> u64 {
        self.map.len() as u64
    }

    pub(super) fn tensors(&self) -> &BTreeMap<String, Stored> {
        &self.tensors
    }

    pub(super) fn load(&self, name: &str, device: &Device) -> Result<Tensor, WeightsError> {
        let missing = || WeightsError::Missing { file: self.path.clone(), name: name.to_owned() };
        let stored = self.tensors.get(name).ok_or_else(missing)?;
        let &(start, end) = self.offsets.get(name).ok_or_else(missing)?;
        let dtype = dtype(&stored.dtype).ok_or_else(|| WeightsError::UnsupportedDtype {
            file: self.path.clone(),
            name: name.to_owned(),
            dtype: stored.dtype.clone(),
        })?;
        let bytes = &self.map[self.data_start + start..self.data_start + end];
        let view = TensorView::new(dtype, stored.shape.clone(), bytes).map_err(candle_core::Error::from);
        let loaded = view.and_then(|view| view.load(device));
        loaded.map_err(|source| WeightsError::Tensor { name: name.to_owned(), source: Box::new(source) })
    }
}

/// Types whose numbers mean what they say; 8-bit and narrower floats need scales that are stored apart.
fn dtype(name: &str) -> Option<Dtype> {
    Some(match name {
        "F64" => Dtype::F64,
        "F32" => Dtype::F32,
        "F16" => Dtype::F16,
        "BF16" => Dtype::BF16,
        "I64" => Dtype::I64,
        "I32" => Dtype::I32,
        "I16" => Dtype::I16,
        "U32" => Dtype::U32,
        "U8" => Dtype::U8,
        _ => return None,
    })
}

/// The parsed header, and where the tensors begin.
fn header(bytes: &[u8]) -> Result<(serde_json::Map<String, Value>, usize), String> {
    let (length, rest) = bytes.split_first_chunk::<8>().ok_or("too short for the length of a header")?;
    let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
    if length > LARGEST_HEADER {
        return Err(format!("claims a header of {length} bytes, more than the format allows; not a safetensors file"));
    }
    let header = rest
        .get(..length)
        .ok_or_else(|| format!("claims a header of {length} bytes, and {} follow: the file is cut off", rest.len()))?;
    let parsed = serde_json::from_slice(header).map_err(|error| format!("the header is not JSON: {error}"))?;
    Ok((parsed, 8 + length))
}

type Entries = (BTreeMap<String, Stored>, BTreeMap<String, (usize, usize)>);

/// Checks every tensor against the file and the others: in range, of the size its shape needs, back to back.
fn entries(header: serde_json::Map<String, Value>, data_length: usize) -> Result<Entries, String> {
    let (mut tensors, mut offsets) = Entries::default();
    for (name, value) in header.into_iter().filter(|(name, _)| name != "__metadata__") {
        let Entry { dtype: dtype_name, shape, data_offsets: (start, end) } =
            serde_json::from_value(value).map_err(|error| format!("tensor `{name}`: {error}"))?;
        if start > end {
            return Err(format!("tensor `{name}` ends at {end}, before it starts at {start}"));
        }
        if end > data_length {
            return Err(format!(
                "tensor `{name}` ends at byte {end}, and there are {data_length}: the file is cut off"
            ));
        }
        let count = elements(&shape).ok_or_else(|| format!("tensor `{name}`: the shape {shape:?} overflows"))?;
        if let Some(dtype) = dtype(&dtype_name) {
            let wanted = count.checked_mul(dtype.bitsize() / 8);
            if wanted != Some(end - start) {
                let bytes = end - start;
                return Err(format!("tensor `{name}`: {shape:?} of {dtype_name} does not take {bytes} bytes"));
            }
        }
        offsets.insert(name.clone(), (start, end));
        tensors.insert(name, Stored { shape, dtype: dtype_name });
    }
    let mut by_start: Vec<(&String, &(usize, usize))> = offsets.iter().collect();
    by_start.sort_by_key(|&(_, range)| range);
    let mut reached = 0;
    for (name, &(start, end)) in by_start {
        if start != reached {
            let how = if start < reached { "overlaps the one before" } else { "leaves a gap before it" };
            return Err(format!("tensor `{name}` at {start} {how}, which ends at {reached}"));
        }
        reached = end;
    }
    if reached != data_length {
        return Err(format!("{} bytes after the last tensor", data_length - reached));
    }
    Ok((tensors, offsets))
}
