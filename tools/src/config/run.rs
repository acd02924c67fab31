//! Executes a configuration's calls one after the other, also those that end later.
//!
//! The control loop calls [`ConfigRun::step`] until it is over, and [`ConfigRun::finished`] when the engine finishes
//! an operation. The first call that fails ends the run: later calls build on earlier ones.

use std::collections::VecDeque;

use serde_json::Value;

use super::{ConfigCall, ConfigError};
use crate::rpc::{Dispatcher, Engine, Reply, RpcError, Token};

/// Where a run stands.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Waits for the engine to finish a call.
    Waiting,
    /// Everything was called.
    Over,
}

/// See the module's head.
#[derive(Debug)]
pub struct ConfigRun {
    calls: VecDeque<ConfigCall>,
    waiting: Option<(Token, ConfigCall)>,
}

impl ConfigRun {
    /// A run that has not begun.
    pub fn new(calls: Vec<ConfigCall>) -> Self {
        Self { calls: calls.into(), waiting: None }
    }

    /// Calls as far as possible without waiting.
    pub fn step(
        &mut self,
        dispatcher: &mut Dispatcher,
        engine: &mut dyn Engine,
    ) -> Result<Step, ConfigError> {
        while self.waiting.is_none() {
            let Some(call) = self.calls.pop_front() else { return Ok(Step::Over) };
            let token = Token::fresh();
            match dispatcher.call(engine, &call.method, call.params.clone(), token) {
                Ok(Reply::Now(_)) => {}
                Ok(Reply::Deferred) => self.waiting = Some((token, call)),
                Err(error) => return Err(failure(&call, error)),
            }
        }
        Ok(Step::Waiting)
    }

    /// Takes an answer of [`Dispatcher::finished`] if it is for this run: `Ok(None)`; else hands it back.
    pub fn finished(
        &mut self,
        token: Token,
        answer: Result<Value, RpcError>,
    ) -> Result<Option<Result<Value, RpcError>>, ConfigError> {
        match self.waiting.take_if(|(waiting, _)| *waiting == token) {
            None => Ok(Some(answer)),
            Some((_, call)) => match answer {
                Ok(_) => Ok(None),
                Err(error) => Err(failure(&call, error)),
            },
        }
    }
}

fn failure(call: &ConfigCall, error: RpcError) -> ConfigError {
    ConfigError::Mistake {
        place: format!("{} ({})", call.place, call.method),
        message: error.message,
    }
}
