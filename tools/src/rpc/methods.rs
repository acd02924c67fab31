//! Dispatch: a method's name and parameters in, a call of the engine, a result or an error out.
//!
//! One table ([`METHODS`]) drives dispatch, parameter checks, `rpc_get_methods` and the tools' help; requests from
//! sockets and from configuration files take the same way through [`Dispatcher::call`]. What an operation makes or
//! removes is recorded when it has succeeded, also when it ends later. Owner: the control thread.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use serde_json::{Map, Value};

use super::{
    engine::{Engine, EngineError, Outcome, Progress, Started},
    error::{METHOD_NOT_FOUND, RpcError},
    nearest::nearest,
    nvme,
    params::{Param, Params},
    record::{Change, Record},
    server::{Methods, Reply, Token},
    show,
};

pub use super::table::METHODS;

/// One RPC method.
#[derive(Debug)]
pub struct Method {
    /// Name on the wire.
    pub name: &'static str,
    /// One line for people.
    pub help: &'static str,
    /// Parameters.
    pub params: &'static [Param],
    pub(super) run: fn(Call<'_>) -> Result<Reply, RpcError>,
}

/// The method of this name.
pub fn find(name: &str) -> Option<&'static Method> {
    METHODS.iter().find(|method| method.name == name)
}

/// The method, or an error that proposes the nearest one.
///
/// The message begins with JSON-RPC's own words, which clients look for.
pub fn find_or_error(name: &str) -> Result<&'static Method, RpcError> {
    find(name).ok_or_else(|| {
        let message = match nearest(name, METHODS.iter().map(|method| method.name)) {
            Some(near) => format!("Method not found; did you mean \"{near}\"?"),
            None => "Method not found".to_owned(),
        };
        RpcError::new(METHOD_NOT_FOUND, message)
    })
}

/// One call under way.
pub(super) struct Call<'a> {
    pub(super) engine: &'a mut dyn Engine,
    pub(super) state: &'a mut State,
    pub(super) params: Params,
    pub(super) token: Token,
}

impl Call<'_> {
    /// The result of an operation that may wait: records `changes` and answers `result` once it has succeeded.
    pub(super) fn conclude(
        self,
        started: Started,
        result: Value,
        changes: Vec<Change>,
    ) -> Result<Reply, RpcError> {
        let pending = Pending { result, changes };
        match started? {
            Progress::Done => Ok(Reply::Now(self.state.settle(pending))),
            Progress::Later => {
                self.state.pending.insert(self.token, pending);
                Ok(Reply::Deferred)
            }
        }
    }

    /// The same for an operation that is done.
    pub(super) fn conclude_now(
        self,
        result: Result<(), EngineError>,
        changes: Vec<Change>,
    ) -> Result<Reply, RpcError> {
        self.conclude(result.map(|()| Progress::Done), Value::Bool(true), changes)
    }
}

#[derive(Debug)]
struct Pending {
    result: Value,
    changes: Vec<Change>,
}

#[derive(Debug)]
struct BdevWait {
    token: Token,
    name: String,
    until: Instant,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) record: Record,
    pending: HashMap<Token, Pending>,
    bdev_waits: Vec<BdevWait>,
}

impl State {
    fn settle(&mut self, pending: Pending) -> Value {
        for change in pending.changes {
            self.record.apply(change);
        }
        pending.result
    }

    /// Answers `token` when the bdev appears, or with an error when it has not by then.
    pub(super) fn wait_for_bdev(&mut self, token: Token, name: &str, patience: Duration) {
        let until = Instant::now() + patience;
        self.bdev_waits.push(BdevWait { token, name: name.to_owned(), until });
    }
}

/// See the module's head.
#[derive(Debug, Default)]
pub struct Dispatcher {
    state: State,
}

impl Dispatcher {
    /// A dispatcher that has recorded nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Executes one method. [`Reply::Deferred`]: its result comes from [`Self::finished`] or [`Self::due`].
    pub fn call(
        &mut self,
        engine: &mut dyn Engine,
        method: &str,
        params: Map<String, Value>,
        token: Token,
    ) -> Result<Reply, RpcError> {
        let method = find_or_error(method)?;
        let params = Params::check(method.name, method.params, params)?;
        (method.run)(Call { engine, state: &mut self.state, params, token })
    }

    /// The dispatcher with its engine, to hand to the server.
    pub fn bind<'a>(&'a mut self, engine: &'a mut dyn Engine) -> Bound<'a> {
        Bound { dispatcher: self, engine }
    }

    /// The engine finished an operation that went on; the answer is what its client gets.
    pub fn finished(
        &mut self,
        token: Token,
        result: Result<Outcome, EngineError>,
    ) -> Result<Value, RpcError> {
        let pending = self.state.pending.remove(&token);
        let outcome = result?;
        let promised = pending.map_or(Value::Bool(true), |pending| self.state.settle(pending));
        Ok(match outcome {
            Outcome::Done => promised,
            Outcome::Bdevs(names) => names.into(),
            Outcome::Health(health) => nvme::show::health(&health),
        })
    }

    /// Answers that time or a new bdev has made due. Cheap; call it once per round of the control loop.
    pub fn due(
        &mut self,
        engine: &dyn Engine,
        now: Instant,
    ) -> Vec<(Token, Result<Value, RpcError>)> {
        let mut answers = Vec::new();
        if self.state.bdev_waits.is_empty() {
            return answers;
        }
        let bdevs = engine.bdevs();
        self.state.bdev_waits.retain(|wait| {
            let answer = match bdevs.iter().find(|bdev| bdev.name == wait.name) {
                Some(bdev) => Ok(Value::Array(vec![show::bdev(bdev)])),
                None if now >= wait.until => Err(EngineError::NoBdev(wait.name.clone()).into()),
                None => return true,
            };
            answers.push((wait.token, answer));
            false
        });
        answers
    }

    /// How long the control loop may sleep for the dispatcher's sake.
    pub fn timeout(&self, now: Instant) -> Option<Duration> {
        self.state.bdev_waits.iter().map(|wait| wait.until.saturating_duration_since(now)).min()
    }

    /// Forgets a bdev that went away by itself (hot removal), so that the saved configuration loads again.
    pub fn bdev_vanished(&mut self, name: &str) {
        self.state.record.apply(Change::Remove { subsystem: "bdev", object: name.to_owned() });
    }

    /// Forgets an NVMe controller that went away by itself, with its bdevs.
    pub fn nvme_vanished(&mut self, name: &str, bdevs: Vec<String>) {
        for change in nvme::forget(name, bdevs) {
            self.state.record.apply(change);
        }
    }

    /// Forgets a controller that went away by itself.
    pub fn controller_vanished(&mut self, name: &str) {
        self.state.record.apply(Change::Remove { subsystem: "vhost_blk", object: name.to_owned() });
    }
}

/// A dispatcher and an engine: what the server calls.
pub struct Bound<'a> {
    dispatcher: &'a mut Dispatcher,
    engine: &'a mut dyn Engine,
}

impl Methods for Bound<'_> {
    fn call(
        &mut self,
        method: &str,
        params: Map<String, Value>,
        token: Token,
    ) -> Result<Reply, RpcError> {
        self.dispatcher.call(self.engine, method, params, token)
    }
}
