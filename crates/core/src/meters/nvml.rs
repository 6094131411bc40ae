//! Energy and memory of an NVIDIA GPU through NVML, which is loaded at run time.
//!
//! Both cover the whole GPU, whoever uses it; allocators keep memory that the program has freed.

use std::sync::Arc;
use std::time::Duration;

use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};

use super::clock::{Clock, Monotonic};
use super::poller::{Poll, Poller};
use super::{Meter, Quantity, Reading, Scope};
use crate::hardware::nvml_why_not;
use crate::metrics;

/// The meter of the GPU that CUDA calls `gpu`.
pub(super) fn open(gpu: usize) -> Box<dyn Meter> {
    let found = Nvml::init().map_err(|e| nvml_why_not(&e)).and_then(|nvml| find(nvml, gpu));
    Box::new(NvmlMeter { gpu: found, running: None })
}

/// A GPU, its name as a sensor, and whether it counts its energy (Volta and later do).
#[derive(Clone)]
struct Gpu {
    nvml: Arc<Nvml>,
    index: u32,
    sensor: String,
    counts_energy: bool,
}

impl Gpu {
    fn device(&self) -> Result<Device<'_>, NvmlError> {
        self.nvml.device_by_index(self.index)
    }

    /// Energy since the driver was loaded, or why the driver does not tell.
    fn energy_mj(&self) -> Result<u64, String> {
        self.device().and_then(|device| device.total_energy_consumption()).map_err(|e| nvml_why_not(&e))
    }
}

fn find(nvml: Nvml, gpu: usize) -> Result<Gpu, String> {
    let count = nvml.device_count().map_err(|e| format!("NVML can't count the GPUs: {e}"))?;
    let devices = (0..count).map(|index| {
        let device = nvml.device_by_index(index);
        let text = |text: Result<String, _>| text.unwrap_or_default();
        device.map_or_else(|_| Default::default(), |d| (text(d.uuid()), text(d.name())))
    });
    let (uuids, names): (Vec<String>, Vec<String>) = devices.unzip();
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    let index = nvml_index(gpu, visible.as_deref(), &uuids)?;
    // CUDA puts faster GPUs first unless told to keep the order of the bus, which is NVML's.
    let by_bus = std::env::var("CUDA_DEVICE_ORDER").is_ok_and(|order| order == "PCI_BUS_ID");
    let alike = names.iter().all(|name| *name == names[0]);
    let doubt = if by_bus || alike { "" } else { " (unless CUDA counts otherwise: set CUDA_DEVICE_ORDER=PCI_BUS_ID)" };
    let sensor = format!("NVML GPU {index}{doubt}");
    let mut gpu = Gpu { nvml: Arc::new(nvml), index, sensor, counts_energy: false };
    gpu.counts_energy = gpu.energy_mj().is_ok();
    Ok(gpu)
}

/// NVML's index of CUDA's GPU number `gpu`, as `CUDA_VISIBLE_DEVICES` (indices or identifiers) renumbers them.
fn nvml_index(gpu: usize, visible: Option<&str>, uuids: &[String]) -> Result<u32, String> {
    let known = |index: usize| index < uuids.len();
    let index = match visible {
        None => Some(gpu).filter(|&index| known(index)),
        Some(list) => {
            let entry = list.split(',').nth(gpu).map(str::trim).filter(|entry| !entry.is_empty());
            let entry = entry.ok_or_else(|| format!("CUDA_VISIBLE_DEVICES={list} has no GPU number {gpu}"))?;
            if entry.starts_with("MIG-") {
                return Err(format!("{entry} is a part of a GPU (MIG), which NVML does not meter apart"));
            }
            let by_number = entry.parse().ok().filter(|&index| known(index));
            by_number.or_else(|| uuids.iter().position(|uuid| entry.starts_with("GPU-") && uuid.starts_with(entry)))
        }
    };
    index.and_then(|index| u32::try_from(index).ok()).ok_or_else(|| {
        let renumbered = visible.map_or(String::new(), |list| format!(" under CUDA_VISIBLE_DEVICES={list}"));
        format!("NVML shows {} GPUs, and none is CUDA's GPU {gpu}{renumbered}", uuids.len())
    })
}

/// What is collected while an interval runs.
struct Samples {
    gpu: Gpu,
    start_mj: Result<u64, String>,
    memory_bytes: Result<u64, String>,
    largest_bytes: u64,
    looks: u32,
    power: PowerIntegral,
}

impl Poll for Samples {
    /// GPUs renew their power reading every 20 to 100 ms.
    const PERIOD: Duration = Duration::from_millis(50);

    fn poll(&mut self) {
        let device = self.gpu.device();
        let memory = device.as_ref().map_err(nvml_why_not);
        self.memory_bytes = memory.and_then(|d| d.memory_info().map(|info| info.used).map_err(|e| nvml_why_not(&e)));
        if let Ok(bytes) = self.memory_bytes {
            self.largest_bytes = self.largest_bytes.max(bytes);
            self.looks += 1;
        }
        if !self.gpu.counts_energy
            && let Ok(milliwatts) = device.and_then(|device| device.power_usage())
        {
            self.power.add(Monotonic.now_ns(), f64::from(milliwatts) / 1e3);
        }
    }
}

impl Samples {
    fn energy(&self) -> Quantity {
        if !self.gpu.counts_energy {
            return self.power.energy(Self::PERIOD);
        }
        counted(&self.start_mj, &self.gpu.energy_mj())
    }

    fn readings(&self) -> Vec<Reading> {
        let used = match &self.memory_bytes {
            Ok(bytes) => Quantity::Measured { value: *bytes as f64 },
            Err(reason) => Quantity::Unavailable { reason: reason.clone() },
        };
        let peak = match self.looks {
            0 => used.clone(),
            looks => Quantity::Derived {
                value: self.largest_bytes as f64,
                from: format!("largest of {looks} samples, {} ms apart", Self::PERIOD.as_millis()),
            },
        };
        readings(&self.gpu.sensor, self.energy(), used, peak)
    }
}

/// Energy between two looks at the counter.
fn counted(start_mj: &Result<u64, String>, end_mj: &Result<u64, String>) -> Quantity {
    let reason = match (start_mj, end_mj) {
        (Ok(start), Ok(end)) if end > start => return Quantity::Measured { value: (end - start) as f64 / 1e3 },
        (Ok(start), Ok(end)) if end == start => {
            "the GPU's energy counter did not move in so short an interval; measure for longer".into()
        }
        (Ok(_), Ok(_)) => "the GPU's energy counter was reset; measure again".into(),
        (Err(reason), _) | (_, Err(reason)) => reason.clone(),
    };
    Quantity::Unavailable { reason }
}

fn readings(sensor: &str, energy: Quantity, memory: Quantity, peak: Quantity) -> Vec<Reading> {
    [(&metrics::ENERGY, energy), (&metrics::DEVICE_MEMORY, memory), (&metrics::DEVICE_PEAK, peak)]
        .map(|(metric, quantity)| Reading::new(metric, Scope::Device, sensor, quantity))
        .into()
}

/// Energy by the trapezoidal rule over samples of power.
#[derive(Default)]
struct PowerIntegral {
    last: Option<(u64, f64)>,
    joules: f64,
    samples: u32,
}

impl PowerIntegral {
    fn add(&mut self, now_ns: u64, watts: f64) {
        if let Some((then_ns, before)) = self.last.replace((now_ns, watts)) {
            self.joules += (before + watts) / 2.0 * now_ns.saturating_sub(then_ns) as f64 / 1e9;
        }
        self.samples += 1;
    }

    fn energy(&self, period: Duration) -> Quantity {
        if self.samples < 2 {
            return Quantity::Unavailable {
                reason: "the GPU has no energy counter, and its driver does not tell its power".into(),
            };
        }
        let from = format!("trapezoidal sum over {} power samples, {} ms apart", self.samples, period.as_millis());
        Quantity::Derived { value: self.joules, from }
    }
}

struct NvmlMeter {
    gpu: Result<Gpu, String>,
    running: Option<Poller<Samples>>,
}

impl Meter for NvmlMeter {
    fn start(&mut self) {
        self.running = self.gpu.as_ref().ok().map(|gpu| {
            Poller::start(Samples {
                start_mj: gpu.energy_mj(),
                gpu: gpu.clone(),
                memory_bytes: Err("the driver was not asked yet".into()),
                largest_bytes: 0,
                looks: 0,
                power: PowerIntegral::default(),
            })
        });
    }

    fn stop(&mut self) -> Vec<Reading> {
        let none = |quantity: Quantity| readings("NVML", quantity.clone(), quantity.clone(), quantity);
        match (&self.gpu, self.running.take()) {
            (Err(reason), _) => none(Quantity::Unavailable { reason: reason.clone() }),
            (Ok(_), None) => none(Quantity::not_started()),
            (Ok(_), Some(running)) => running.finish(|samples| samples.readings()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuda_numbers_become_nvml_numbers() {
        let uuids: Vec<String> = ["GPU-aa11", "GPU-bb22", "GPU-cc33"].map(String::from).into();
        let index = |gpu, visible| nvml_index(gpu, visible, &uuids);
        assert_eq!((index(0, None), index(2, None)), (Ok(0), Ok(2)));
        assert_eq!(index(0, Some("2,0")), Ok(2));
        assert_eq!(index(1, Some("2, 0")), Ok(0));
        assert_eq!(index(0, Some("GPU-bb")), Ok(1));
        assert!(index(3, None).is_err_and(|e| e.contains("3 GPUs")));
        assert!(index(1, Some("2")).is_err_and(|e| e.contains("has no GPU number 1")));
        assert!(index(0, Some("")).is_err());
        assert!(index(0, Some("MIG-aa11")).is_err_and(|e| e.contains("MIG")));
        for wrong in ["7", "GPU-zz", "G"] {
            assert!(index(0, Some(wrong)).is_err_and(|e| e.contains("CUDA_VISIBLE_DEVICES")), "{wrong}");
        }
    }

    #[test]
    fn power_samples_add_up_by_trapezoids() {
        let mut power = PowerIntegral::default();
        power.add(0, 100.0);
        assert!(matches!(power.energy(Samples::PERIOD), Quantity::Unavailable { .. }));
        power.add(1_000_000_000, 200.0);
        power.add(1_500_000_000, 200.0);
        let Quantity::Derived { value, from } = power.energy(Samples::PERIOD) else { panic!("enough samples") };
        assert_eq!(value, 250.0);
        assert!(from.contains("3 power samples, 50 ms apart"));
    }

    #[test]
    fn a_counter_that_fails_on_the_way_gives_its_reason() {
        let lost = || Err(nvml_why_not(&NvmlError::GpuLost));
        assert_eq!(counted(&Ok(1000), &Ok(3500)), Quantity::Measured { value: 2.5 });
        let reason = |start, end| match counted(&start, &end) {
            Quantity::Unavailable { reason } => reason,
            quantity => panic!("{quantity:?}"),
        };
        assert!(reason(Ok(1000), lost()).contains("fallen off the bus"));
        assert!(reason(lost(), Ok(1000)).contains("fallen off the bus"));
        assert!(reason(Ok(7), Ok(7)).contains("longer") && reason(Ok(7), Ok(6)).contains("reset"));
    }

    #[test]
    fn a_missing_gpu_is_unavailable_with_its_reason() {
        let mut meter = NvmlMeter { gpu: Err("no driver".into()), running: None };
        meter.start();
        let readings = meter.stop();
        let metrics: Vec<&str> = readings.iter().map(|r| r.metric.as_str()).collect();
        assert_eq!(metrics, ["energy", "device_memory", "device_peak"]);
        for reading in readings {
            assert_eq!(reading.quantity, Quantity::Unavailable { reason: "no driver".into() });
        }
    }
}
