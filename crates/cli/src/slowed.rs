//! A session that is slower than it would be, by a known share: what the study of comparisons plants and looks for.

use std::collections::BTreeMap;
use std::time::Instant;

use roofbench_core::cost::PhaseCost;
use roofbench_core::session::{Call, Observer, Session, SessionError, Tensors};

/// Spins after each call for a share of the time that it took.
pub(crate) struct Slowed {
    pub(crate) session: Box<dyn Session>,
    /// Per cent of a call's time.
    pub(crate) percent: f64,
}

impl Session for Slowed {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let began = Instant::now();
        let outputs = self.session.call(call, observer)?;
        let until = began.elapsed().mul_f64(1.0 + self.percent / 100.0);
        while began.elapsed() < until {
            std::hint::spin_loop();
        }
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        self.session.cost(call)
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.session.paths()
    }
}
