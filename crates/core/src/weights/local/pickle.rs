//! PyTorch's `.bin`: a zip with one pickle of names and shapes, and one file of raw bytes per storage.
//!
//! Candle's reader interprets the few opcodes that a state dict needs as plain data and calls nothing: a class that it
//! does not know as a tensor is left out, whatever it is named. It was written for well-meant files, so that shapes are
//! checked here before it allocates, and a panic of its own becomes an error.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use candle_core::pickle::PthTensors;
use candle_core::{Device, Tensor};

use super::{Stored, elements};
use crate::weights::WeightsError;

/// Nested objects are freed by recursion; enough for any nesting that a pickle of a megabyte can hold.
const READER_STACK: usize = 512 << 20;

pub(super) struct PickleFile {
    path: PathBuf,
    bytes: u64,
    reader: PthTensors,
    tensors: BTreeMap<String, Stored>,
}

impl std::fmt::Debug for PickleFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PickleFile").field("path", &self.path).field("tensors", &self.tensors).finish_non_exhaustive()
    }
}

impl PickleFile {
    /// `head` holds the first bytes of the file.
    pub(super) fn open(path: &Path, head: &[u8]) -> Result<Self, WeightsError> {
        let io = |source| WeightsError::Io { file: path.to_owned(), source };
        let damaged = |reason| WeightsError::Damaged { file: path.to_owned(), reason };
        if !head.starts_with(b"PK") {
            return Err(WeightsError::Unsupported {
                file: path.to_owned(),
                reason: "not a zip, which PyTorch writes since 1.6; load it there and save it again as safetensors"
                    .to_owned(),
            });
        }
        let bytes = std::fs::metadata(path).map_err(io)?.len();
        let owned = path.to_owned();
        let reader = std::thread::Builder::new()
            .stack_size(READER_STACK)
            .spawn(move || PthTensors::new(owned, None))
            .map_err(io)?
            .join()
            .map_err(|_| damaged("the pickle of names and shapes is malformed".to_owned()))?
            .map_err(|error| damaged(format!("the pickle of names and shapes can't be read: {error}")))?;
        let mut tensors = BTreeMap::new();
        for (name, info) in reader.tensor_infos() {
            let shape = info.layout.dims().to_vec();
            let wanted = elements(&shape).and_then(|count| count.checked_mul(info.dtype.size_in_bytes()));
            if wanted.is_none_or(|wanted| wanted as u64 > bytes) {
                return Err(damaged(format!(
                    "tensor `{name}`: {shape:?} of {} is more than the whole file's {bytes} bytes",
                    info.dtype.as_str()
                )));
            }
            tensors.insert(name.clone(), Stored { shape, dtype: info.dtype.as_str().to_uppercase() });
        }
        if tensors.is_empty() {
            return Err(damaged("holds no tensors by name".to_owned()));
        }
        Ok(Self { path: path.to_owned(), bytes, reader, tensors })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn tensors(&self) -> &BTreeMap<String, Stored> {
        &self.tensors
    }

    pub(super) fn load(&self, name: &str, device: &Device) -> Result<Tensor, WeightsError> {
        let damaged = |reason| WeightsError::Damaged { file: self.path.clone(), reason };
        let read = catch_unwind(AssertUnwindSafe(|| self.reader.get(name)))
            .map_err(|_| damaged(format!("tensor `{name}` is described in a way that can't be")))?
            .map_err(|error| damaged(format!("tensor `{name}` can't be read: {error}")))?;
        let tensor = read.ok_or_else(|| WeightsError::Missing { file: self.path.clone(), name: name.to_owned() })?;
        let moved = tensor.contiguous().and_then(|tensor| tensor.to_device(device));
        moved.map_err(|source| WeightsError::Tensor { name: name.to_owned(), source: Box::new(source) })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use candle_core::DType;

    use super::*;
    use crate::weights::aliases::Aliases;
    use crate::weights::local::Checkpoint;

    fn text(value: &str) -> Vec<u8> {
        [b"X", &(value.len() as u32).to_le_bytes()[..], value.as_bytes()].concat()
    }

    fn tuple(items: &[&[u8]]) -> Vec<u8> {
        [b"(", &items.concat()[..], b"t"].concat()
    }

    /// BININT
    fn number(value: u32) -> Vec<u8> {
        [b"J", &value.to_le_bytes()[..]].concat()
    }

    /// A state dict of one tensor `w` as `torch.save` pickles it, calling `function` to build it.
    fn state_dict(function: &str, storage: &str, shape: [u32; 2], stride: [u32; 2], stored: u32) -> Vec<u8> {
        let class = format!("ctorch\n{storage}\n");
        let id = tuple(&[&text("storage"), class.as_bytes(), &text("0"), &text("cpu"), &number(stored)]);
        let pair = |values: [u32; 2]| tuple(&[&number(values[0]), &number(values[1])]);
        let arguments = [[&id[..], b"Q"].concat(), number(0), pair(shape), pair(stride), b"\x89}".to_vec()].concat();
        let built = [function.as_bytes(), &tuple(&[&arguments]), b"R"].concat();
        [&b"\x80\x02}"[..], &text("w"), &built, b"s."].concat()
    }

    fn plain_dict(shape: [u32; 2], stride: [u32; 2]) -> Vec<u8> {
        state_dict("ctorch._utils\n_rebuild_tensor_v2\n", "FloatStorage", shape, stride, 6)
    }

    fn zipped(pickle: &[u8], storage: &[u8]) -> Vec<u8> {
        let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
        let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
        for (name, content) in [("archive/data.pkl", pickle), ("archive/data/0", storage)] {
            zip.start_file(name, stored).unwrap();
            zip.write_all(content).unwrap();
        }
        zip.finish().unwrap().into_inner()
    }

    fn storage() -> Vec<u8> {
        (0..6).flat_map(|i| (i as f32).to_le_bytes()).collect()
    }

    /// The tensor `w` of a folder that holds this `pytorch_model.bin`.
    fn read(file: &[u8]) -> Result<Vec<Vec<f32>>, String> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("pytorch_model.bin"), file).unwrap();
        let checkpoint = Checkpoint::open(folder.path(), &Aliases::compile(&[], "M").unwrap());
        let tensor = checkpoint.and_then(|checkpoint| checkpoint.load("w", None, DType::F32, &Device::Cpu));
        tensor.map(|tensor| tensor.to_vec2().unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn tensors_are_read_in_either_order_of_dimensions() {
        let rows = read(&zipped(&plain_dict([2, 3], [3, 1]), &storage())).unwrap();
        assert_eq!(rows, [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]);
        let columns = read(&zipped(&plain_dict([2, 3], [1, 2]), &storage())).unwrap();
        assert_eq!(columns, [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]);
    }

    #[test]
    fn a_pickle_that_would_run_a_program_runs_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let made = folder.path().join("made");
        let command = text(&format!("touch {}", made.display()));
        let call = [&b"\x80\x02cposix\nsystem\n"[..], &tuple(&[&command]), b"R."].concat();
        let message = read(&zipped(&call, &storage())).unwrap_err();
        assert!(message.contains("pytorch_model.bin"), "{message}");
        let within = state_dict("cposix\nsystem\n", "FloatStorage", [2, 3], [3, 1], 6);
        let message = read(&zipped(&within, &storage())).unwrap_err();
        assert!(message.contains("pytorch_model.bin"), "{message}");
        assert!(!made.exists());
    }

    #[test]
    fn hostile_files_are_refused_by_name() {
        let whole = zipped(&plain_dict([2, 3], [3, 1]), &storage());
        let short_arguments = [&b"\x80\x02}"[..], &text("w"), b"ctorch._utils\n_rebuild_tensor_v2\n(tRs."].concat();
        for (file, named) in [
            (b"".to_vec(), "PyTorch writes since 1.6"),
            (b"\x80\x02\x8a\x0al\xfc\x9c\x46\xf9".to_vec(), "PyTorch writes since 1.6"),
            (whole[..whole.len() / 2].to_vec(), "can't be read"),
            (b"PK\x03\x04".to_vec(), "can't be read"),
            (zipped(b"", &storage()), "can't be read"),
            (zipped(b"\x80\x02}\xff.", &storage()), "can't be read"),
            (zipped(b"\x80\x02}.", &storage()), "no tensors"),
            (zipped(&short_arguments, &storage()), "malformed"),
            (zipped(&plain_dict([u32::MAX >> 1, u32::MAX >> 1], [1, 1]), &storage()), "`w`"),
            (zipped(&plain_dict([2_000_000_000, 2], [2, 1]), &storage()), "`w`: [2000000000, 2] of f32 is more"),
            (zipped(&plain_dict([2, 3], [3, 1]), &storage()[..20]), "`w` can't be read"),
            (zipped(&plain_dict([2, 3], [7, 2]), &storage()), "`w` can't be read"),
            (
                zipped(&state_dict("ctorch._utils\n_rebuild_tensor_v2\n", "BoolStorage", [2, 3], [3, 1], 6), &[1; 6]),
                "no tensors",
            ),
        ] {
            let message = read(&file).unwrap_err();
            assert!(message.contains("pytorch_model.bin: ") && message.contains(named), "{named}: {message}");
        }
    }
}
