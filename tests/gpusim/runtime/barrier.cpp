// Block barriers and the meeting of lanes in warp collectives.
#include "engine.h"

namespace sim {

bool barrier_ready(const NamedBarrier& barrier) {
  unsigned wanted = barrier.wanted ? barrier.wanted : engine.alive;
  return barrier.arrived && barrier.arrived >= wanted;
}

void barrier_open(unsigned id) {
  NamedBarrier& barrier = engine.barriers[id];
  bool everybody = !barrier.arrivals_only && barrier.arrived >= engine.alive;
  barrier.result = barrier.accumulated;
  if (everybody) {
    new_epoch();
  } else {
    for (Fiber* fiber : engine.fibers)
      if (!fiber->done && fiber->wait == Wait::Barrier && fiber->slot == id)
        acquire(*fiber, barrier.released);
  }
  barrier.arrived = barrier.wanted = barrier.arrivals_only = 0;
  barrier.released.clear();
  ++barrier.generation;
  ++engine.progress;
}

namespace {

NamedBarrier& enter(unsigned id, unsigned count, unsigned line) {
  if (id >= BARRIERS) fatal("invalid barrier", "barrier " + std::to_string(id), line);
  if (count % WARP || count > engine.fibers.size() + WARP)
    fatal("invalid barrier", "thread count " + std::to_string(count), line);
  NamedBarrier& barrier = engine.barriers[id];
  if (barrier.arrived && barrier.wanted != count)
    fatal("divergent barrier", "threads meet at one barrier with different thread counts", line);
  barrier.wanted = count;
  ++barrier.arrived;
  return barrier;
}

// All lanes of a warp must reach the same aligned barrier instruction.
void require_convergence(unsigned id, unsigned line) {
  const Fiber& self = *engine.current;
  for (const Fiber* fiber : engine.fibers)
    if (fiber->warp == self.warp && !fiber->done && fiber != &self &&
        fiber->wait == Wait::Barrier && (fiber->barrier_line != line || fiber->slot != id) &&
        fiber->generation == engine.barriers[fiber->slot].generation)
      finding("divergent barrier",
              "lanes of one warp wait at different barriers: thread " + std::to_string(fiber->id) +
                  " at " + source_line(fiber->barrier_line),
              line);
}

}  // namespace

void wait_for(Wait kind, unsigned slot, unsigned generation) {
  Fiber& fiber = *engine.current;
  fiber.wait = kind;
  fiber.slot = slot;
  fiber.generation = generation;
  suspend();
  fiber.wait = Wait::None;
}

void barrier(unsigned id, unsigned count, bool aligned, unsigned line) {
  NamedBarrier& barrier = enter(id, count, line);
  Fiber& fiber = *engine.current;
  if (aligned) require_convergence(id, line);
  if (count && count != engine.fibers.size()) barrier.released.join(release(fiber));
  fiber.barrier_line = line;
  if (!barrier_ready(barrier)) {
    wait_for(Wait::Barrier, id, barrier.generation);
    return;
  }
  fiber.wait = Wait::Barrier;  // to take part in the exchange of clocks
  fiber.slot = id;
  barrier_open(id);
  fiber.wait = Wait::None;
}

void barrier_arrive(unsigned id, unsigned count, unsigned line) {
  NamedBarrier& barrier = enter(id, count, line);
  ++barrier.arrivals_only;
  barrier.released.join(release(*engine.current));
  if (barrier_ready(barrier)) barrier_open(id);
}

uint32_t barrier_reduce(bool predicate, BarrierOp op, unsigned id, unsigned count, unsigned line) {
  NamedBarrier& state = engine.barriers[id % BARRIERS];
  if (!state.arrived) state.accumulated = op == BarrierOp::And;
  if (op == BarrierOp::And)
    state.accumulated &= (uint32_t)predicate;
  else if (op == BarrierOp::Or)
    state.accumulated |= (uint32_t)predicate;
  else
    state.accumulated += predicate;
  barrier(id, count, true, line);
  return state.result;
}

namespace {

// The only warp collective that orders memory between its lanes.
void exchange_clocks(void**, uint32_t mask) {
  unsigned base = engine.current->id - engine.current->lane;
  Snapshot together;
  for (unsigned lane = 0; lane < WARP; ++lane)
    if (mask >> lane & 1) together.join(release(*engine.fibers[base + lane]));
  for (unsigned lane = 0; lane < WARP; ++lane)
    if (mask >> lane & 1) acquire(*engine.fibers[base + lane], together);
}

void note_mask(void** arguments, uint32_t mask) {
  for (unsigned lane = 0; lane < WARP; ++lane)
    if (mask >> lane & 1) *(uint32_t*)arguments[lane] = mask;
}

bool is_blocked(const Fiber& fiber) {
  if (fiber.wait == Wait::Barrier)
    return fiber.generation == engine.barriers[fiber.slot].generation;
  return fiber.wait == Wait::Collective &&
         fiber.generation == fiber.warp->rendezvous[fiber.slot].generation;
}

}  // namespace

// Lanes that have exited do not count. For activemask neither do those that wait elsewhere: the
// lanes that get here are as converged as they can be.
bool rendezvous_ready(const Rendezvous& place, const Warp& warp) {
  uint32_t missing = place.mask & warp.alive & ~place.arrived;
  if (!place.arrived || !missing || place.function != note_mask) return place.arrived && !missing;
  size_t base = (&warp - engine.warps.data()) * WARP;
  for (unsigned lane = 0; lane < WARP; ++lane)
    if ((missing >> lane & 1) && !is_blocked(*engine.fibers[base + lane])) return false;
  return true;
}

void rendezvous_complete(Rendezvous& place) {
  place.function(place.arguments, place.arrived);
  place.arrived = 0;
  ++place.generation;
  ++engine.progress;
}

void collective(uint32_t mask, void* argument, CollectiveFunction function, unsigned line) {
  Fiber& fiber = *engine.current;
  Warp& warp = *fiber.warp;
  uint32_t self = 1u << fiber.lane;
  if (!(mask & self))
    fatal("divergent warp", "a lane takes part in a warp collective whose mask leaves it out",
          line);
  Rendezvous* place = nullptr;
  for (Rendezvous& r : warp.rendezvous) {
    bool same = r.line == line || function == exchange_clocks;
    if (r.arrived && r.mask == mask && r.function == function && same && !(r.arrived & self))
      place = &r;
  }
  for (Rendezvous& r : warp.rendezvous)
    if (!place && !r.arrived) place = &r;
  if (!place)
    fatal("divergent warp", "lanes of one warp are at too many different collectives", line);
  place->mask = mask;
  place->function = function;
  place->line = line;
  place->arguments[fiber.lane] = argument;
  place->arrived |= self;
  fiber.barrier_line = line;
  if (rendezvous_ready(*place, warp))
    rendezvous_complete(*place);
  else
    wait_for(Wait::Collective, place - warp.rendezvous, place->generation);
}

uint32_t active_mask(unsigned line) {
  uint32_t mask = 0;
  collective(engine.current->warp->lanes, &mask, note_mask, line);
  return mask;
}

void warp_barrier(uint32_t mask, unsigned line) {
  collective(mask, nullptr, exchange_clocks, line);
}

}  // namespace sim
