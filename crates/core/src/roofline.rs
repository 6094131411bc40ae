//! Where a phase lies under the machine's measured roofline (Williams, Waterman, Patterson, CACM 2009).

use serde::Serialize;

use crate::cost::Cost;
use crate::hardware::Machine;

/// What bounds a phase at its arithmetic intensity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// At or right of the ridge point: arithmetic.
    Compute,
    /// Left of the ridge point: memory traffic.
    Memory,
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Compute => "compute-bound",
            Self::Memory => "memory-bound",
        })
    }
}

/// The two measured ceilings that hold for a cell.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Ceiling {
    /// Type whose arithmetic peak this is; `f32` for a 16-bit type where the CPU is faster, or only works, in f32.
    pub dtype: String,
    /// Threads that both peaks were measured with.
    pub threads: u32,
    /// Peak arithmetic in FLOP/s.
    pub flops: f64,
    /// Peak read bandwidth in bytes/s.
    pub bytes_per_second: f64,
}

impl Ceiling {
    /// The ceilings of `machine` for work in `dtype` on `threads` threads of `device` (`cpu`, `cuda:0`, `metal`).
    ///
    /// # Errors
    /// The reason in words when a peak is missing.
    pub fn of(machine: &Machine, device: &str, dtype: &str, threads: u32) -> Result<Self, String> {
        if device != "cpu" {
            return Err(format!("peaks are measured on the CPU, and this ran on {device}"));
        }
        let peaks =
            machine.peaks.as_ref().ok_or("no measured peaks for this machine; `roofbench probe` measures them")?;
        let no_peak = |what: &str| format!("no measured {what} at {threads} threads; `roofbench probe` measures peaks");
        // 16-bit weights can be widened, and f32 is the faster way on some CPUs and the only one on others
        let wider = matches!(dtype, "bf16" | "f16").then_some("f32");
        let (dtype, flops) = std::iter::once(dtype)
            .chain(wider)
            .filter_map(|dtype| Some((dtype, peaks.flops(dtype, threads)?)))
            .max_by(|(_, a), (_, b)| a.total_cmp(b))
            .ok_or_else(|| no_peak(&format!("{dtype} FLOP/s")))?;
        let bytes_per_second = peaks.read_bandwidth(threads).ok_or_else(|| no_peak("read bandwidth"))?;
        if !(flops > 0.0 && bytes_per_second > 0.0) {
            return Err("a measured peak is not a positive number; measure again with `roofbench probe`".to_owned());
        }
        Ok(Self { dtype: dtype.to_owned(), threads, flops, bytes_per_second })
    }

    /// Arithmetic intensity at which both ceilings meet, in FLOP per byte.
    pub fn ridge_point(&self) -> f64 {
        self.flops / self.bytes_per_second
    }

    /// The most FLOP/s to be had at `intensity` FLOP per byte.
    pub fn attainable(&self, intensity: f64) -> f64 {
        self.flops.min(intensity * self.bytes_per_second)
    }

    /// The place of work of `cost` that took `seconds`.
    ///
    /// # Errors
    /// The reason in words when the cost or the time gives no point to place.
    pub fn place(&self, cost: Cost, seconds: f64) -> Result<Position, String> {
        let intensity = cost.arithmetic_intensity().ok_or("the cost counts no bytes")?;
        if cost.flops == 0 {
            return Err("the cost counts no FLOPs".to_owned());
        }
        if seconds <= 0.0 {
            return Err("the phase took less than a tick of the clock".to_owned());
        }
        let (achieved, attainable) = (cost.flops as f64 / seconds, self.attainable(intensity));
        Ok(Position {
            intensity,
            achieved,
            attainable,
            fraction: achieved / attainable,
            bound: if intensity >= self.ridge_point() { Bound::Compute } else { Bound::Memory },
        })
    }
}

/// A point under the roofline.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Position {
    /// Arithmetic intensity in FLOP per byte.
    pub intensity: f64,
    /// FLOP/s reached.
    pub achieved: f64,
    /// FLOP/s that the roofline allows at this intensity.
    pub attainable: f64,
    /// Achieved over attainable.
    pub fraction: f64,
    /// What bounds it.
    pub bound: Bound,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::hardware::ComputePeak;

    /// 100 GFLOP/s in f32 and 10 GB/s at 2 threads: the ridge is at 10 FLOP per byte.
    pub(crate) fn machine() -> Machine {
        let machine = serde_json::json!({
            "cpu": {"model": "Testing CPU", "arch": "x86_64", "threads": 2, "usable_threads": 2, "caches": [], "isa": ["avx2"]},
            "memory": {"total_bytes": 17_179_869_184_u64},
            "gpus": [],
            "os": {"name": "Testing"},
            "peaks": {
                "measured_at": "2026-01-01T00:00:00Z",
                "compute": [{"dtype": "f32", "path": "fma", "threads": 2, "flops": 100e9}],
                "bandwidth": [{"kind": "read", "threads": 2, "bytes_per_second": 10e9, "array_bytes": 1_073_741_824}],
            },
        });
        serde_json::from_value(machine).unwrap()
    }

    fn cost(flops: u64, weight_bytes: u64) -> Cost {
        Cost { flops, weight_bytes, ..Cost::default() }
    }

    #[test]
    fn both_sides_of_the_ridge_by_hand() {
        let ceiling = Ceiling::of(&machine(), "cpu", "f32", 2).unwrap();
        assert_eq!(ceiling.ridge_point(), 10.0);
        // 5 FLOP per byte: 50 GFLOP/s allowed; 1 GFLOP in 40 ms is 25 GFLOP/s
        let left = ceiling.place(cost(1_000_000_000, 200_000_000), 0.04).unwrap();
        assert_eq!((left.attainable, left.achieved, left.fraction, left.bound), (50e9, 25e9, 0.5, Bound::Memory));
        // 20 FLOP per byte: the arithmetic peak
        let right = ceiling.place(cost(1_000_000_000, 50_000_000), 0.02).unwrap();
        assert_eq!((right.attainable, right.achieved, right.fraction, right.bound), (100e9, 50e9, 0.5, Bound::Compute));
        // at the ridge both hold
        let ridge = ceiling.place(cost(1_000_000_000, 100_000_000), 0.01).unwrap();
        assert_eq!((ridge.fraction, ridge.bound), (1.0, Bound::Compute));
    }

    #[test]
    fn a_missing_peak_is_a_reason_and_not_a_number() {
        let mut machine = machine();
        let reason =
            |machine: &Machine, device, dtype, threads| Ceiling::of(machine, device, dtype, threads).unwrap_err();
        assert!(reason(&machine, "cuda:0", "f32", 2).contains("cuda:0"));
        assert!(reason(&machine, "cpu", "f32", 3).contains("f32 FLOP/s at 3 threads"));
        assert!(reason(&machine, "cpu", "int8", 2).contains("int8"));
        machine.peaks.as_mut().unwrap().bandwidth.clear();
        assert!(reason(&machine, "cpu", "f32", 2).contains("read bandwidth"));
        machine.peaks = None;
        assert!(reason(&machine, "cpu", "f32", 2).contains("no measured peaks"));
    }

    #[test]
    fn sixteen_bits_are_held_against_the_faster_way_to_compute_them() {
        let mut machine = machine();
        assert_eq!(Ceiling::of(&machine, "cpu", "bf16", 2).unwrap().dtype, "f32", "no instructions");
        let mut with = |flops| {
            let bf16 = ComputePeak { dtype: "bf16".into(), path: "dot".into(), threads: 2, flops };
            machine.peaks.as_mut().unwrap().compute.push(bf16);
            let ceiling = Ceiling::of(&machine, "cpu", "bf16", 2).unwrap();
            (ceiling.dtype, ceiling.flops)
        };
        assert_eq!(with(50e9), ("f32".to_owned(), 100e9), "half as fast as f32");
        assert_eq!(with(200e9), ("bf16".to_owned(), 200e9), "twice as fast");
    }

    #[test]
    fn nothing_to_place_is_said() {
        let ceiling = Ceiling::of(&machine(), "cpu", "f32", 2).unwrap();
        assert!(ceiling.place(cost(1, 0), 1.0).unwrap_err().contains("bytes"));
        assert!(ceiling.place(cost(0, 1), 1.0).unwrap_err().contains("FLOPs"));
        assert!(ceiling.place(cost(1, 1), 0.0).unwrap_err().contains("clock"));
    }
}
